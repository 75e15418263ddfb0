"""Attention of training-time test: the keys of step 0 up to a chain's position, and its own of
later steps.

A chain is a position that is unrolled. Chain c of a row, at position t, attends to the row's step-0
keys 0 … t and, at step i, to its own keys of steps 1 … i: one softmax over both kinds. Rows are
packed, and each is worked on in blocks of chains; of long rows the backward pass makes a block's
scores again, so that they are held for one block at a time.

C chains of all rows, K tokens of all rows that serve as keys, c chains and n keys of one block, Hkv
key/value heads, G query heads a key/value head, hd head_dim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

BLOCK = 256  # chains


class Block(NamedTuple):
    """The next `count` queries, of row `row`, whose first `n` keys the last of them sees."""

    count: int
    row: int
    n: int


class Queries(NamedTuple):
    blocks: list[Block]
    positions: torch.Tensor  # in their rows


class UnrolledAttention:
    """The `attend` of each step. A step may run again in the backward pass (activation
    checkpointing): it then replaces its own keys."""

    def __init__(self, key_counts: list[int], chains: Queries, first: Queries) -> None:
        """key_counts: keys of each row. first: the queries of step 0."""
        self.key_counts, self.chains, self.first = key_counts, chains, first
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """q [1, Hkv * G, C, hd] (K of them at step 0 where all tokens ask); k and v [1, Hkv, K, hd]
        at step 0, [1, Hkv, C, hd] later -> [1, C or K, Hkv * G, hd]."""
        q, k, v = (x[0].to(v.dtype) for x in (q, k, v))
        self.keys, self.values = [*self.keys[:step], k], [*self.values[:step], v]
        blocks, positions = self.chains if step else self.first
        counts = [block.count for block in blocks]
        rows = [x.split(self.key_counts, 1) for x in (self.keys[0], self.values[0])]
        own = [x.split(counts, 1) for x in (*self.keys[1:], *self.values[1:])]
        queries = q.unflatten(0, (k.shape[0], -1)).split(counts, 2)
        out = []
        parts = zip(queries, blocks, positions.split(counts), *own, strict=True)
        for query, block, place, *later in parts:
            known = [x[block.row][:, : block.n] for x in rows]
            given = query, place, *known, *later
            if block.n <= BLOCK:
                out.append(attend(*given))
            else:  # scores of many keys are made again in the backward pass; few cost less to keep
                made = checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False)
                out.append(made)
        return torch.cat(out, 2).flatten(0, 1).transpose(0, 1)[None]


def attend(q: torch.Tensor, positions, keys, values, *own: torch.Tensor) -> torch.Tensor:
    """q [Hkv, G, c, hd], positions [c], keys and values [Hkv, n, hd], own keys and then own values
    [Hkv, c, hd] of each later step -> [Hkv, G, c, hd]."""
    (Hkv, G, c, hd), n, dtype = q.shape, keys.shape[1], q.dtype
    if not q.is_cuda:  # small bf16 products of ever new shapes are slow there
        q, keys, values, *own = (x.float() for x in (q, keys, values, *own))
    own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.reshape(Hkv, G * c, hd) @ keys.transpose(1, 2)).view(Hkv, G, c, n).float()
        later = torch.arange(n, device=q.device) > positions[:, None]
        scores = [scores.masked_fill(later, float("-inf"))]
        scores += [(q * k[:, None]).sum(-1, keepdim=True, dtype=torch.float32) for k in own_keys]
        weights = (torch.cat(scores, -1) * hd**-0.5).softmax(-1).to(q.dtype)
        out = (weights[..., :n].reshape(Hkv, G * c, n) @ values).view(q.shape)
        for i, value in enumerate(own_values):
            out = out + weights[..., n + i, None] * value[:, None]
    return out.to(dtype)
