"""Attention of tree nodes over a static cache: plain-PyTorch reference.

B rows, N queries, M tree slots (the last N of them are the queries' own), W = ceil(M / 32) words of
mask, Hq query heads, Hkv key/value heads, C capacity, S live slots, D head_dim.

Row b's keys are its prefix, slots 0 … lengths[b]-1 at positions 0 … lengths[b]-1, followed by M
tree slots lengths[b] … lengths[b]+M-1 at positions `tree_positions[b]`. A query sees the whole
prefix (inside its sliding window) and the tree slots that its mask names. Nothing else is read:
slots past lengths[b]+M may hold anything, NaN included."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import dispatched


def attention_bias(
    lengths: torch.Tensor,
    tree_mask: torch.Tensor,
    tree_positions: torch.Tensor,
    live: int,
    dtype: torch.dtype,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Additive bias [B, 1, N, S]: 0 where a query may look, -inf elsewhere.

    lengths [B] int64; tree_mask [B, N, M] bool; tree_positions [B, M] int64 (absolute; the queries
    are the last N); live = S >= max(lengths) + M. A window of w sees the keys at positions > query
    - w."""
    B, N, M = tree_mask.shape
    slot = torch.arange(live, device=lengths.device)
    offset = slot[None] - lengths[:, None]  # [B, S]; >= 0 inside the tree
    inside = (offset >= 0) & (offset < M)
    index = offset.clamp(0, M - 1)
    in_tree = tree_mask.gather(2, index[:, None].expand(B, N, live)) & inside[:, None]
    visible = (offset < 0)[:, None] | in_tree  # [B, N, S]
    if sliding_window is not None:
        key_position = torch.where(offset < 0, slot[None], tree_positions.gather(1, index))
        query_position = tree_positions[:, M - N :]
        visible = visible & (key_position[:, None] > query_position[..., None] - sliding_window)
    bias = torch.zeros((B, N, live), dtype=dtype, device=lengths.device)
    return bias.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, Hq, N, D], k and v [B, Hkv, S, D], bias [B, 1, N, S] -> [B, N, Hq, D] in q's dtype.

    bias may also come folded, [B, 1, G*N, S] with G = Hq / Hkv, when many layers share it. softcap:
    scores become softcap * tanh(scores / softcap) before the bias; sinks [Hq]: one extra logit a
    head that takes probability and gives nothing. A query that sees nothing yields zeros."""
    B, Hq, N, D = q.shape
    Hkv = k.shape[1]
    G = Hq // Hkv
    # the G query heads of one key/value head share its keys: fold them into the query axis
    folded = q.reshape(B, Hkv, G * N, D)
    bias = fold(bias, N, G)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias, scale=scaling)
    else:
        scores = (folded.float() @ k.float().transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + bias
        if sinks is not None:
            sink = sinks.float().view(1, Hkv, G, 1).expand(B, Hkv, G, N)
            scores = torch.cat([scores, sink.reshape(B, Hkv, G * N, 1)], dim=-1)
        scores = scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = scores.exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        out = (weights[..., : k.shape[2]] @ v.float()).to(q.dtype)
    return out.reshape(B, Hq, N, D).transpose(1, 2)


def fold(bias: torch.Tensor, N: int, G: int) -> torch.Tensor:
    """[B, 1, N, S] -> [B, 1, G*N, S], for the G query heads that share a key/value head."""
    return bias.repeat(1, 1, G, 1) if G > 1 and bias.shape[2] == N else bias


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """mask [B, N, M] bool -> words [B, N, W] int32: bit m % 32 of word m // 32 is mask[..., m]."""
    B, N, M = mask.shape
    words = F.pad(mask, (0, -M % 32)).reshape(B, N, -1, 32).int()
    # distinct bits: the sum is their union, with bit 31 as the sign
    return (words << torch.arange(32, dtype=torch.int32, device=mask.device)).sum(
        -1, dtype=torch.int32
    )


def unpack_bits(bits: torch.Tensor, M: int) -> torch.Tensor:
    """Words [B, N, W] int32 -> mask [B, N, M] bool."""
    B, N, W = bits.shape
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().reshape(B, N, 32 * W)[..., :M]


def tree_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    tree_bits: torch.Tensor,
    tree_positions: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of N tree nodes a row over its prefix and its tree; see the module's text.

    q [B, Hq, N, D] and k_cache, v_cache [B, Hkv, C, D] in one dtype (the caches may be strided
    views of a larger buffer); rows [B] int64: the cache's row of each, where the cache holds others
    too or another order; lengths [B] int64; tree_bits [B, N, W] int32 (`pack_bits`); tree_positions
    [B, M] int64, absolute; sinks [Hq], any float dtype. Returns [B, N, Hq, D] in q's dtype. No
    gradients.

    A row's result depends on its own arguments alone, bit for bit on the Triton path: not on the
    rows beside it, and not on C. This reference reads max(lengths) on the host."""
    M = tree_positions.shape[1]
    live = int(lengths.max()) + M
    if rows is not None:
        k_cache, v_cache = k_cache[rows], v_cache[rows]
    mask = unpack_bits(tree_bits, M)
    bias = attention_bias(lengths, mask, tree_positions, live, q.dtype, sliding_window)
    k, v = reachable(k_cache[:, :, :live], v_cache[:, :, :live], lengths + M)
    return attend(q, k, v, bias, scaling, softcap, sinks)


tree_attention = dispatched(
    tree_attention_reference, "triton_tree_attention", "tree_attention_triton"
)


def reachable(
    k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, Hkv, S, D] with every slot >= ends[b] zeroed, because 0 x NaN is NaN."""
    stale = torch.arange(k.shape[2], device=k.device)[None] >= ends[:, None]  # [B, S]
    stale = stale[:, None, :, None]
    return k.masked_fill(stale, 0), v.masked_fill(stale, 0)
