"""The one token that the target picks at each node: plain-PyTorch reference.

B rows, N nodes, V vocabulary.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax(log p + g) with g ~ Gumbel(0, 1)
is a sample of p. The noise is a hash of (seed, position, token id), counter-based as in Salmon et al. 2011:
it does not depend on the tree, the slot or the batch, so the same request gives the same text whether its
tokens are decoded one by one or verified as a tree.
"""

from __future__ import annotations

import torch

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

    seeds [B] int64 (all 64 bits count); positions [B, N] int64.
    """
    low, high = seeds & MASK32, (seeds >> 32) & MASK32
    key = mix32(mix32(low ^ 0x9E3779B9) ^ high)[:, None]  # [B, 1]
    key = mix32(key ^ mix32((positions & MASK32) ^ 0x85EBCA6B))  # [B, N]
    second = mix32(key ^ 0xC2B2AE35)
    token = torch.arange(vocab_size, device=positions.device)
    bits = mix32(mix32(token ^ key[..., None]) ^ second[..., None])
    uniform = ((bits >> 8).float() + 0.5) * 2.0**-24  # in (0, 1), never an end point
    return -torch.log(-torch.log(uniform))


def process_logits(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """[..., V] -> float32 scores with what is cut off at -inf. Order and meaning are transformers':
    temperature, top-k, top-p (the smallest set whose mass reaches top_p), min-p."""
    scores = logits.float() / temperature
    V = scores.shape[-1]
    if 0 < top_k < V:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        cut = mass.cumsum(-1) - mass >= top_p
        cut[..., 0] = False
        scores = scores.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), float("-inf"))
    if min_p > 0.0:
        floor = scores.amax(-1, keepdim=True) + torch.log(torch.tensor(min_p))
        scores = scores.masked_fill(scores < floor, float("-inf"))
    return scores


def choose(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """logits [B, N, V], seeds [B], positions [B, N] (of the token to be chosen) -> choices [B, N] int64."""
    if temperature == 0.0:
        return logits.float().argmax(-1)
    scores = process_logits(logits, temperature, top_k, top_p, min_p)
    return (scores + gumbel_noise(seeds, positions, logits.shape[-1])).argmax(-1)
