"""The one token that the target picks at each node: plain-PyTorch reference.

B rows, N nodes, V vocabulary.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax(log p + g) with g ~
Gumbel(0, 1) is a sample of p. The noise is a hash of (seed, position, token id), counter-based as
in Salmon et al. 2011: it does not depend on the tree, the slot or the batch, so the same request
gives the same text whether its tokens are decoded one by one or verified as a tree."""

from __future__ import annotations

import math

import torch

from kernels.dispatch import dispatched

MASK32 = 0xFFFFFFFF


def mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers with good avalanche (the lowbias32 constants of Wellons' hash
    prospector), on int64 tensors that hold values below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel(0, 1) noise [B, N, V] float32, a pure function of (seed, position, token id).

    seeds [B] int64 (all 64 bits count); positions [B, N] int64."""
    low, high = seeds & MASK32, (seeds >> 32) & MASK32
    key = mix32(mix32(low ^ 0x9E3779B9) ^ high)[:, None]  # [B, 1]
    key = mix32(key ^ mix32((positions & MASK32) ^ 0x85EBCA6B))  # [B, N]
    second = mix32(key ^ 0xC2B2AE35)
    token = torch.arange(vocab_size, device=positions.device)
    bits = mix32(mix32(token ^ key[..., None]) ^ second[..., None])
    # 23 bits: with 24 the largest, 2^24 - 0.5, would round up to 1, and its noise be infinite
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), never an end point
    return -torch.log(-torch.log(uniform))


def process_logits(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """[..., V] -> float32 scores with what is cut off at -inf. Order and meaning are transformers',
    but that equal scores share one fate: temperature; top-k keeps what is at least the k-th largest
    score; top-p, among those, what is preceded by less than top_p of probability (strictly more
    probable tokens); min-p, what has at least min_p of the largest probability.

    Each parameter is a number or a tensor [B], one a row of logits [B, ..., V]. Off: top_k <= 0 or
    >= V, top_p <= 0 or >= 1, min_p 0. A row of temperature 0 keeps its logits' scale."""
    V = logits.shape[-1]
    temperature = per_row(temperature, logits)
    scores = logits.float() / torch.where(temperature == 0, 1.0, temperature)
    # each of the three keeps all scores from a floor up, so together those from the highest floor
    floors = []
    some_k = isinstance(top_k, torch.Tensor) or 0 < top_k < V
    some_p = isinstance(top_p, torch.Tensor) or 0.0 < top_p < 1.0
    if some_p or isinstance(top_k, torch.Tensor):
        ordered = scores.sort(dim=-1, descending=True).values
    if some_k and not isinstance(top_k, torch.Tensor):
        floors.append(scores.topk(top_k, dim=-1).values[..., -1:])
    elif some_k:
        k = per_row(top_k, logits, torch.int64)
        k = torch.where((k <= 0) | (k >= V), V, k)
        floors.append(ordered.gather(-1, (k - 1).expand(*logits.shape[:-1], 1)))
    if some_p:
        p = per_row(top_p, logits)
        p = torch.where((p <= 0.0) | (p >= 1.0), math.inf, p)
        if some_k:
            ordered = ordered.masked_fill(ordered < floors[0], -math.inf)
        mass = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
        before = torch.nn.functional.pad(mass[..., :-1], (1, 0))
        kept = (before < p).sum(-1, keepdim=True).clamp_min(1)
        floors.append(ordered.gather(-1, kept - 1))
    if isinstance(min_p, torch.Tensor) or min_p > 0.0:
        floors.append(scores.amax(-1, keepdim=True) + per_row(min_p, logits).log())
    for floor in floors:
        scores = scores.masked_fill(scores < floor, -math.inf)
    return scores


def per_row(
    value: float | torch.Tensor, logits: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A number or a tensor [B] as a tensor that broadcasts against logits [B, ..., V].

    A number becomes a tensor too: CUDA divides by a number as it multiplies by its reciprocal, and
    a request must come out the same whether the others in its batch share its parameters or not."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=dtype, device=logits.device)
    return value.to(dtype).reshape(-1, *[1] * (logits.dim() - 1))


def choose_reference(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """logits [B, N, V], seeds [B], positions [B, N] (of the token to be chosen) -> choices [B, N]
    int64.

    Each parameter is a number, or a tensor [B] on the logits' device (float32; top_k int64), one a
    row; see `process_logits`. Rows of temperature 0 take the largest logit, the first of equals.
    Numbers tell the host what need not be done: pass temperature=0.0 when all rows are greedy,
    top_p=1.0 when none cuts."""
    mixed = isinstance(temperature, torch.Tensor)
    if not mixed and temperature == 0.0:
        return logits.float().argmax(-1)
    scores = process_logits(logits, temperature, top_k, top_p, min_p)
    sampled = (scores + gumbel_noise(seeds, positions, logits.shape[-1])).argmax(-1)
    if not mixed:
        return sampled
    return torch.where(temperature[:, None] == 0, logits.float().argmax(-1), sampled)


choose = dispatched(choose_reference, "triton_choose", "choose_triton")
