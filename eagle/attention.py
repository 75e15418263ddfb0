"""How a tree reaches stock attention layers: one function registered with transformers.

Rows are packed: a pass is one row of T tokens to the model, [1, T], and a `TreeContext` says which
of them belong to which row of the cache. Layers that are called without a context (stock
`generate`, training) fall through to transformers' own attention.

b rows, N queries of the longest row, T = tokens of all rows, M tree slots, S live slots, D
head_dim."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from kernels.dispatch import fast, use_triton
from kernels.tree_attention import (
    attend,
    attention_bias,
    fold,
    pack_bits,
    reachable,
    tree_attention,
)

from .cache import StaticKVCache

NAME = "eagle_tree"


class TreeContext:
    """Where the tokens of one pass sit, and what they may see.

    positions [b, N] int64: absolute, of the queries. mask [b, N, M] bool and tree_positions [b, M]:
    the tree's slots, the queries the last N of them, the first at slot length + 0; None for a
    causal pass over an empty cache. offset = M - N. counts: tokens of each row, on the host, where
    rows differ; the pass then holds only the first counts[i] of row i's N."""

    def __init__(
        self,
        cache: StaticKVCache,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        tree_positions: torch.Tensor | None = None,
        counts: list[int] | None = None,
    ) -> None:
        self.cache, self.positions = cache, positions
        self.mask, self.tree_positions = mask, tree_positions
        _, N = self.shape = tuple(positions.shape)
        self.offset = 0 if mask is None else mask.shape[2] - N
        self.counts = counts if counts is not None and min(counts) < N else None
        self.layers_seen = 0
        device = positions.device
        self.index = None  # [T] where the packed tokens lie in [b*N]
        if self.counts is not None:
            # found on the host, which need not wait for the device then
            real = np.arange(N) < np.asarray(self.counts)[:, None]
            self.index = torch.from_numpy(np.flatnonzero(real)).to(device)
            self._counts = torch.tensor(self.counts, device=device)
        lengths = cache.host_lengths
        self.live = cache.capacity
        if lengths is not None:
            ends = np.asarray(lengths) + (N if self.counts is None else np.asarray(self.counts))
            self.live = self.offset + int(ends.max())
        assert self.live <= cache.capacity, f"{self.live} slots do not fit {cache.capacity}"
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._bias: dict = {}
        self._bits: torch.Tensor | None = None
        self._packed = None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[b, N, ...] -> [1, T, ...]: the tokens of all rows one behind the other."""
        if self.index is None:
            return x if self.shape[0] == 1 else x.flatten(0, 1)[None]
        return x.flatten(0, 1)[self.index][None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] -> [b, N, ...], zeros where a row has no token."""
        b, N = self.shape
        if self.index is None:
            return x if b == 1 else x[0].unflatten(0, (b, N))
        out = x.new_zeros(b * N, *x.shape[2:])
        out[self.index] = x[0]
        return out.unflatten(0, (b, N))

    def packed(self):
        """What the C++ kernel asks of a pass, with starts [b + 1] of each row's tokens among the
        packed."""
        if self._packed is None:
            b, N = self.shape
            starts = torch.tensor([0, *itertools.accumulate(self.counts or [N] * b)])
            slots = self.cache.buffer, self.cache.rows, starts, self.cache.lengths
            places = self.positions if self.mask is None else self.tree_positions
            self._packed = torch.classes.eagle_cpu.Pass(*slots, self.mask, places, self.offset)
        return self._packed

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [1, Hkv, T, D] go to the slots of this pass."""
        keys, values = self.cache.layer(layer)
        if self._slots is None:
            step = torch.arange(self.offset, self.offset + self.shape[1], device=k.device)
            slots = self.cache.lengths[:, None] + step  # [b, N]
            rows = self.cache.rows[:, None].expand(self.shape)
            self._slots = self.pack(rows)[0], self.pack(slots)[0]
        rows, slots = self._slots
        # advanced indices on dims 0 and 2 come to the front: [T, Hkv, D]
        keys[rows, :, slots] = k[0].transpose(0, 1)
        values[rows, :, slots] = v[0].transpose(0, 1)

    def write_padding(self, layer: int) -> bool:
        """Zeros to all N slots of every row, where they fit."""
        lengths, N = self.cache.host_lengths, self.shape[1]
        if lengths is None or max(lengths) + self.offset + N > self.cache.capacity:
            return False
        step = torch.arange(self.offset, self.offset + N, device=self.positions.device)
        slots, rows = (
            self.cache.lengths[:, None] + step,
            self.cache.rows[:, None].expand(self.shape),
        )
        for half in self.cache.layer(layer):
            half[rows, :, slots] = 0
        return True

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Live keys and values [b, Hkv, S, D]."""
        k, v = (x[:, :, : self.live] for x in self.cache.layer(layer))
        if not self.cache.whole:
            k, v = k[self.cache.rows], v[self.cache.rows]
        # another row's length must not make stale slots readable: 0 x NaN is NaN
        new = self.shape[1] if self.counts is None else self._counts
        return reachable(k, v, self.cache.lengths + self.offset + new)

    def bias(self, dtype: torch.dtype, window: int | None, groups: int) -> torch.Tensor:
        """The additive bias, folded for `groups` query heads a key/value head, one for all layers
        that share a window."""
        key = (dtype, window, groups)
        if key in self._bias:
            return self._bias[key]
        device = self.positions.device
        if self.mask is None:  # causal: key position = query position
            N = self.shape[1]
            visible = torch.ones(N, N, dtype=torch.bool, device=device).tril()
            if window is not None:
                visible = visible.triu(-(window - 1))
            bias = torch.zeros(1, 1, N, N, dtype=dtype, device=device)
            bias.masked_fill_(~visible, float("-inf"))
        else:
            bias = attention_bias(
                self.cache.lengths, self.mask, self.tree_positions, self.live, dtype, window
            )
        self._bias[key] = fold(bias, self.shape[1], groups)
        return self._bias[key]

    def attend(
        self, layer: int, q, k, v, scaling: float, window=None, softcap=None, sinks=None
    ) -> torch.Tensor:
        """Write this pass's keys and values, and attend. q [1, Hq, T, D], k and v [1, Hkv, T, D]
        -> [1, T, Hq, D]."""
        self.layers_seen += 1
        if fast(q) and q.dtype != torch.float64:
            options = scaling, window or 0, softcap or 0.0, sinks
            return torch.ops.eagle_cpu.attend(self.packed(), q, k, v, layer, *options)
        kernel = self.mask is not None and use_triton(q)
        if kernel and self.index is not None:
            # the kernel reads all N slots of a row: what is not a token must be a number at least
            kernel = self.write_padding(layer)
        self.write(layer, k, v)
        groups = q.shape[1] // k.shape[1]
        queries = self.unpack(q.transpose(1, 2)).transpose(1, 2)  # [b, Hq, N, D]
        if kernel:
            return self._attend_kernel(layer, queries, scaling, window, softcap, sinks)
        if self.mask is None:
            # padding comes after a row's tokens, so that no token sees it
            k, v = (self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
            if window is None and softcap is None and sinks is None:
                out = F.scaled_dot_product_attention(
                    queries, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1
                )
                return self.pack(out.transpose(1, 2))
        else:
            k, v = self.read(layer)
        bias = self.bias(q.dtype, window, groups)
        return self.pack(attend(queries, k, v, bias, scaling, softcap, sinks))

    def _attend_kernel(self, layer, queries, scaling, window, softcap, sinks) -> torch.Tensor:
        """The Triton kernel reads each row's live slots in place."""
        if self._bits is None:
            self._bits = pack_bits(self.mask)
        out = tree_attention(
            queries,
            *self.cache.layer(layer),
            self.cache.lengths,
            self._bits,
            self.tree_positions,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
            sinks=sinks,
            rows=None if self.cache.whole else self.cache.rows,
        )
        return self.pack(out)


def tree_attention_forward(
    module: torch.nn.Module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    softcap=None,
    sliding_window=None,
    s_aux=None,
    tree: TreeContext | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if tree is None:
        given = module, query, key, value, attention_mask
        scales = {"dropout": dropout, "scaling": scaling}
        if softcap is not None:
            return eager_attention_forward(*given, **scales, softcap=softcap)
        kwargs.pop("position_ids", None)
        return sdpa_attention_forward(*given, **scales, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = tree.attend(
        tree.cache.updated_layer, query, key, value, scaling, sliding_window, softcap, s_aux
    )
    return out.contiguous(), None


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
