"""Attention of training-time test: the keys of step 0 up to a chain's position, and its own of later steps.

A chain is a position that is unrolled. Chain c of a row, at position t, attends to the row's step-0 keys
0 … t and, at step i, to its own keys of steps 1 … i: one softmax over both kinds. Rows are packed, and each
is worked on in blocks of chains, so that scores are held for one block at a time; the backward pass makes
them again.

C chains of all rows, N tokens of all rows that serve as keys, c chains and n keys of one block, i own keys,
Hkv key/value heads, G query heads a key/value head, hd head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 256  # chains


@dataclass(frozen=True)
class Block:
    """Chains start … stop - 1 of one row, whose keys are first … first + n - 1: n is one more than the last
    chain's position."""

    start: int
    stop: int
    first: int
    n: int

    @property
    def chains(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.first + self.n)


class UnrolledAttention:
    """The `attend` of each step.

    A step may run again in the backward pass (activation checkpointing): it then replaces its own keys.
    """

    def __init__(self, blocks: list[Block], positions: torch.Tensor) -> None:
        """positions [C]: of the chains, in their rows."""
        self.blocks, self.positions = blocks, positions
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [1, Hkv * G, C, hd]; k and v [1, Hkv, N, hd] at step 0, [1, Hkv, C, hd] later -> [1, C, Hkv * G, hd]."""
        q, k, v = (x[0].to(v.dtype) for x in (q, k, v))
        self.keys, self.values = [*self.keys[:step], k], [*self.values[:step], v]
        q = q.unflatten(0, (k.shape[0], -1))
        out = _Attend.apply(self.blocks, self.positions, q, *self.keys, *self.values)
        return out.flatten(0, 1).transpose(0, 1)[None]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, positions, q, *keys_and_values):
        """q [Hkv, G, C, hd], keys [Hkv, N, hd], own keys [Hkv, C, hd] …, values alike -> [Hkv, G, C, hd]."""
        saved, dtype = (positions, q, *keys_and_values), q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, (keys, *own_keys), (values, *own_values) = _widened(q, keys_and_values)
            own_scores = _dots(q, own_keys)
            own_weights, out = torch.empty_like(own_scores), torch.empty_like(q)
            for block in blocks:
                weights, own = _weights(block, positions, q, keys, own_scores)
                own_weights[:, :, block.chains] = own
                found = weights.to(q.dtype).flatten(1, 2) @ values[:, block.keys]
                out[:, :, block.chains] = found.view(*weights.shape[:3], -1)
            for value, weight in zip(own_values, own_weights.unbind(-1), strict=True):
                out += weight[..., None] * value[:, None]
        out = out.to(dtype)
        ctx.blocks = blocks
        ctx.save_for_backward(out, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        out, positions, q, *keys_and_values = ctx.saved_tensors
        dtype, scale = q.dtype, q.shape[-1] ** -0.5
        q, (keys, *own_keys), (values, *own_values) = _widened(q, keys_and_values)
        d_out, out = d_out.to(q.dtype), out.to(q.dtype)
        mean = (d_out * out).sum(-1, keepdim=True, dtype=torch.float32)  # [Hkv, G, C, 1]
        own_scores, d_own = _dots(q, own_keys), _dots(d_out, own_values)
        own_weights, d_q = torch.empty_like(own_scores), torch.empty_like(q)
        # blocks of a row share the keys of step 0
        d_keys, d_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for block in ctx.blocks:
            weights, own_weights[:, :, block.chains] = _weights(
                block, positions, q, keys, own_scores
            )
            shape = weights.shape
            query, d_found = (x[:, :, block.chains].reshape(shape[0], -1, q.shape[-1]) for x in (q, d_out))
            d_values[:, block.keys] += weights.to(q.dtype).flatten(1, 2).transpose(1, 2) @ d_found
            d_scores = (d_found @ values[:, block.keys].transpose(1, 2)).view(shape).float()
            d_scores = d_scores.sub_(mean[:, :, block.chains]).mul_(weights).mul_(scale)
            d_scores = d_scores.to(q.dtype).flatten(1, 2)
            d_keys[:, block.keys] += d_scores.transpose(1, 2) @ query
            d_q[:, :, block.chains] = (d_scores @ keys[:, block.keys]).view(*shape[:3], -1)
        d_own = (d_own - mean) * own_weights * scale
        grads_of_keys, grads_of_values = [d_keys], [d_values]
        for key, weight, d_score in zip(own_keys, own_weights.unbind(-1), d_own.unbind(-1), strict=True):
            d_q += d_score[..., None] * key[:, None]
            grads_of_keys.append((d_score[..., None] * q).sum(1))
            grads_of_values.append((weight[..., None] * d_out).sum(1))
        grads = (x.to(dtype) for x in (d_q, *grads_of_keys, *grads_of_values))
        return None, None, *grads


def _widened(q: torch.Tensor, keys_and_values) -> tuple[torch.Tensor, list, list]:
    """Queries, keys and values in the dtype of the products: fp32 on a CPU, where small bf16 products of
    ever new shapes are slow."""
    dtype = q.dtype if q.is_cuda else torch.float32
    q, *wide = (x.to(dtype) for x in (q, *keys_and_values))
    half = len(wide) // 2
    return q, wide[:half], wide[half:]


def _dots(q: torch.Tensor, own: list[torch.Tensor]) -> torch.Tensor:
    """q [Hkv, G, C, hd], own [Hkv, C, hd] each -> [Hkv, G, C, i] fp32."""
    if not own:
        return q.new_empty(*q.shape[:3], 0, dtype=torch.float32)
    return torch.stack([(q * x[:, None]).sum(-1, dtype=torch.float32) for x in own], -1)


def _weights(
    block: Block, positions: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, own_scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over both kinds of key -> fp32 weights of step 0's [Hkv, G, c, n] and own [Hkv, G, c, i]."""
    Hkv, G, _, hd = q.shape
    query = q[:, :, block.chains].reshape(Hkv, -1, hd)
    scores = (query @ keys[:, block.keys].transpose(1, 2)).view(Hkv, G, -1, block.n).float()
    later = torch.arange(block.n, device=q.device) > positions[block.chains, None]  # [c, n]
    scores.masked_fill_(later, float("-inf"))
    both = torch.cat([scores, own_scores[:, :, block.chains]], -1).mul_(hd**-0.5).softmax(-1)
    return both[..., : block.n], both[..., block.n :]
