"""Attention of training-time test: the keys of step 0 up to a chain's position, and its own of
later steps.

A chain is a position that is unrolled. Chain c of a row, at position t, attends to the row's step-0
keys 0 … t and, at step i, to its own keys of steps 1 … i: one softmax over both kinds. Rows are
packed, and each is worked on in blocks of chains, so that scores are held for one block at a time;
the backward pass makes them again.

C chains of all rows, N tokens of all rows that serve as keys, c chains and n keys of one block, i
own keys, Hkv key/value heads, G query heads a key/value head, hd head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 256  # chains


@dataclass(frozen=True)
class Block:
    """Chains start … stop - 1 of one row, whose keys are first … first + n - 1. n and seen: one
    more than the last and the first chain's position, so that every chain sees the first `seen`
    keys and none more than n."""

    start: int
    stop: int
    first: int
    n: int
    seen: int

    @property
    def chains(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.first + self.n)


class UnrolledAttention:
    """The `attend` of each step.

    A step may run again in the backward pass (activation checkpointing): it then replaces its own
    keys.
    """

    def __init__(
        self,
        blocks: list[Block],
        positions: torch.Tensor,
        every: tuple[list[Block], torch.Tensor] | None = None,
    ) -> None:
        """positions [C]: of the chains, in their rows. every: blocks and positions [N] of all
        tokens, which are the queries of step 0 then."""
        self.queries = blocks, behind(blocks, positions)
        self.first = self.queries if every is None else (every[0], behind(*every))
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [1, Hkv * G, C, hd] (N of them at step 0 where all tokens ask); k and v [1, Hkv, N, hd]
        at step 0, [1, Hkv, C, hd] later -> [1, C or N, Hkv * G, hd]."""
        q, k, v = (x[0].to(v.dtype) for x in (q, k, v))
        self.keys, self.values = [*self.keys[:step], k], [*self.values[:step], v]
        q = q.unflatten(0, (k.shape[0], -1))
        queries = self.queries if step else self.first
        out = _Attend.apply(*queries, q, *self.keys, *self.values)
        return out.flatten(0, 1).transpose(0, 1)[None]


def behind(blocks: list[Block], positions: torch.Tensor) -> list[torch.Tensor]:
    """For each block [c, n - seen] bool: of the keys that not all of its chains see, those a chain
    does not.
    """
    return [
        torch.arange(block.seen, block.n, device=positions.device) > positions[block.chains, None]
        for block in blocks
    ]


class _Attend(torch.autograd.Function):
    """The softmax is taken in two parts: `top` and `total` of a query are the largest score and the
    sum of exp(score - top), over both kinds of key."""

    @staticmethod
    def forward(ctx, blocks, later, q, *keys_and_values):
        """q [Hkv, G, C, hd], keys [Hkv, N, hd], own keys [Hkv, C, hd] …, values alike -> [Hkv, G,
        C, hd].
        """
        saved, dtype = (q, *keys_and_values), q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, (keys, *own_keys), (values, *own_values) = _widened(q, keys_and_values)
            own = _dots(q, own_keys)  # [Hkv, G, C, i]
            out = torch.empty_like(q)
            top, total = own.new_empty(2, *q.shape[:3]).unbind()
            highest = own.amax(-1) if own_keys else None
            for block, mask in zip(blocks, later, strict=True):
                scores = _scores(block, mask, q, keys)  # [Hkv, G, c, n]
                most = scores.amax(-1)
                if own_keys:
                    most = torch.maximum(most, highest[:, :, block.chains])
                weights = scores.sub_(most[..., None]).exp_()
                top[:, :, block.chains], total[:, :, block.chains] = most, weights.sum(-1)
                found = weights.to(q.dtype).flatten(1, 2) @ values[:, block.keys]
                out[:, :, block.chains] = found.view(*weights.shape[:3], -1)
            own = own.sub_(top[..., None]).exp_()
            for value, weight in zip(own_values, own.unbind(-1), strict=True):
                out += (weight[..., None] * value[:, None]).to(out.dtype)
            total += own.sum(-1)
            out = (out / total[..., None]).to(dtype)
        ctx.blocks, ctx.later = blocks, later
        ctx.save_for_backward(out, top + total.log(), *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        out, log_total, q, *keys_and_values = ctx.saved_tensors
        dtype, hd = q.dtype, q.shape[-1]
        q, (keys, *own_keys), (values, *own_values) = _widened(q, keys_and_values)
        d_out = d_out.to(q.dtype)
        mean = (d_out * out).sum(-1, keepdim=True, dtype=torch.float32)  # [Hkv, G, C, 1]
        d_q = torch.empty_like(q)
        # blocks of a row share the keys of step 0
        d_keys, d_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for block, mask in zip(ctx.blocks, ctx.later, strict=True):
            chains, seen = block.chains, block.keys
            weights = _scores(block, mask, q, keys)
            weights = weights.sub_(log_total[:, :, chains, None]).exp_()  # [Hkv, G, c, n]
            shape = weights.shape
            query, d_found = (x[:, :, chains].reshape(shape[0], -1, hd) for x in (q, d_out))
            d_values[:, seen] += weights.to(q.dtype).flatten(1, 2).transpose(1, 2) @ d_found
            d_scores = (d_found @ values[:, seen].transpose(1, 2)).view(shape).float()
            d_scores = d_scores.sub_(mean[:, :, chains]).mul_(weights).to(q.dtype).flatten(1, 2)
            d_keys[:, seen] += d_scores.transpose(1, 2) @ query
            d_q[:, :, chains] = (d_scores @ keys[:, seen]).view(*shape[:3], hd)
        scale = hd**-0.5
        grads_of_keys, grads_of_values = [d_keys.mul_(scale)], [d_values]
        weights = (_dots(q, own_keys) - log_total[..., None]).exp_()  # [Hkv, G, C, i]
        d_own = (_dots(d_out, own_values, 1.0) - mean) * weights
        for n, key in enumerate(own_keys):
            d_q += d_own[..., n, None] * key[:, None]
            grads_of_keys.append((d_own[..., n, None] * q).sum(1).mul_(scale))
            grads_of_values.append((weights[..., n, None] * d_out).sum(1))
        grads = (x.to(dtype) for x in (d_q.mul_(scale), *grads_of_keys, *grads_of_values))
        return None, None, *grads


def _widened(q: torch.Tensor, keys_and_values) -> tuple[torch.Tensor, list, list]:
    """Queries, keys and values in the dtype of the products: fp32 on a CPU, where small bf16
    products of ever new shapes are slow."""
    dtype = q.dtype if q.is_cuda else torch.float32
    q, *wide = (x.to(dtype) for x in (q, *keys_and_values))
    half = len(wide) // 2
    return q, wide[:half], wide[half:]


def _dots(q: torch.Tensor, own: list[torch.Tensor], scale: float | None = None) -> torch.Tensor:
    """q [Hkv, G, C, hd], own [Hkv, C, hd] each -> [Hkv, G, C, i] fp32, scaled as scores are by
    default.
    """
    if not own:
        return q.new_empty(*q.shape[:3], 0, dtype=torch.float32)
    dots = torch.stack([(q * x[:, None]).sum(-1, dtype=torch.float32) for x in own], -1)
    return dots.mul_(q.shape[-1] ** -0.5 if scale is None else scale)


def _scores(block: Block, later: torch.Tensor, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scaled scores [Hkv, G, c, n] fp32 of a block's chains and keys, -inf for keys behind a
    chain's position. later [c, n - seen]: those, among the keys that not all chains see."""
    Hkv, G, _, hd = q.shape
    query = q[:, :, block.chains].reshape(Hkv, -1, hd)
    scores = (query @ keys[:, block.keys].transpose(1, 2)).float().mul_(hd**-0.5)
    scores = scores.view(Hkv, G, -1, block.n)
    scores[..., block.seen :].masked_fill_(later, float("-inf"))
    return scores
