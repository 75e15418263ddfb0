"""How a tree reaches stock attention layers: one function registered with transformers.

A forward pass carries a `TreeContext` as an ordinary keyword argument. Layers that are called without one
(stock `generate`, training) fall through to transformers' own attention.

B rows, N queries, M tree slots, S live slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from kernels.tree_attention import attend, attention_bias, fold, reachable

NAME = "eagle_tree"


@dataclass
class TreeContext:
    """Where the queries of one forward pass sit, and what they may see.

    lengths [B] int64: committed slots before this pass. positions [B, N] int64: absolute, of the queries.
    mask [B, N, M] bool and tree_positions [B, M]: the tree's slots, the queries last; None for a causal
    prefill of an empty cache. live: an upper bound of max(lengths) + M, known on the host. row_ends: each
    row's own lengths + M where rows differ, else None.
    """

    lengths: torch.Tensor
    positions: torch.Tensor
    live: int
    row_ends: list[int] | None = None
    mask: torch.Tensor | None = None
    tree_positions: torch.Tensor | None = None
    layers_seen: int = 0
    _bias: dict = field(default_factory=dict)
    _ends: torch.Tensor | None = None

    def bias(self, dtype: torch.dtype, window: int | None, groups: int) -> torch.Tensor:
        """The additive bias, folded for `groups` query heads a key/value head; built once for all layers
        that share a window."""
        key = (dtype, window, groups)
        if key not in self._bias:
            if self.mask is None:  # causal prefill: key position = query position
                T = self.positions.shape[1]
                visible = torch.ones(T, T, dtype=torch.bool, device=self.lengths.device).tril()
                if window is not None:
                    visible = visible.triu(-(window - 1))
                bias = torch.zeros(1, 1, T, T, dtype=dtype, device=self.lengths.device)
                bias.masked_fill_(~visible, float("-inf"))
            elif (
                self.row_ends is None and window is None
            ):  # the tree's columns stand behind a free prefix
                tree = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
                tree.masked_fill_(~self.mask, float("-inf"))
                bias = F.pad(tree, (self.live - self.mask.shape[2], 0)).unsqueeze(1)
            else:
                bias = attention_bias(
                    self.lengths, self.mask, self.tree_positions, self.live, dtype, window
                )
            self._bias[key] = fold(bias, self.positions.shape[1], groups)
        return self._bias[key]

    def reachable(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ends is None:
            self._ends = self.lengths + self.mask.shape[2]
        return reachable(k, v, self._ends)

    @property
    def sees_all(self) -> bool:
        """One query a row sees everything up to itself: no bias is needed but for a window."""
        return self.mask is not None and self.mask.shape[1:] == (1, 1)


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    tree: TreeContext | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, N, D], key and value [B, Hkv, S, D] (what the cache returned) -> [B, N, Hq, D]."""
    if tree is None:
        if softcap is not None:
            return eager_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                softcap=softcap,
            )
        kwargs.pop("position_ids", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    tree.layers_seen += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_tree(tree, query, key, value, scaling, sliding_window, softcap, s_aux), None


def attend_tree(
    tree: TreeContext,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [B, Hq, N, D] over what the cache returned [B, Hkv, S, D] -> [B, N, Hq, D]."""
    prefill = tree.mask is None
    if prefill and sliding_window is None and softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)
    bias = None
    if not tree.sees_all or sliding_window is not None:
        bias = tree.bias(query.dtype, sliding_window, query.shape[1] // key.shape[1])
    if tree.row_ends is None or prefill:
        return attend(query, key, value, bias, scaling, softcap, sinks)
    if query.device.type != "cpu":
        key, value = tree.reachable(key, value)
        bias = tree.bias(query.dtype, sliding_window, query.shape[1] // key.shape[1])
        return attend(query, key, value, bias, scaling, softcap, sinks)
    # on a CPU each row reads its own live slots and nothing else: cheaper than masking the longest row's
    rows = [
        attend(
            query[b : b + 1], key[b : b + 1, :, :end], value[b : b + 1, :, :end],
            None if bias is None else bias[b : b + 1, :, :, :end], scaling, softcap, sinks,
        )
        for b, end in enumerate(tree.row_ends)
    ]  # fmt: skip
    return torch.cat(rows)


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
