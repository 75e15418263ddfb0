"""Attention of tree nodes over a static cache: Triton.

For row b, query n and query head h, over the visible keys j of key/value head h // G:

    s_j = cap(scaling * q . k_j)                        cap(x) = softcap * tanh(x / softcap), or x
    out = sum_j e^(s_j) v_j / (sum_j e^(s_j) + e^(sink_h))

with 0 where nothing is visible. The specification is
`kernels.tree_attention.tree_attention_reference`.

Flash-decoding (Dao et al. 2023): each row's reachable keys are cut into splits, `_attend_split`
makes a partial result of each, and `_merge` joins them by their log-sum-exp. The cut is computed on
the device from the row's own reachable length, so the grid is fixed (CUDA graphs), splits that a
short row does not have end at once, and a row's result depends, bit for bit, neither on the
capacity nor on the rows beside it.

The G query heads that share a key/value head are folded with the N queries into R = G * N tile
rows: each key is read once for BLOCK_R of them.

B rows, N queries, M tree slots, W words of mask, Hq and Hkv heads, C capacity, D head_dim."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A row is cut into splits of MIN_SPLIT keys, or longer ones where that makes over MAX_SPLITS.
# With 8 key/value heads 16 splits fill one wave of 132 multiprocessors at one row.
MIN_SPLIT = 256
MAX_SPLITS = 16
LOG2E = 1.4426950408889634


@triton.jit
def _span(length, places, N, M, C, window, WINDOW, SPLIT, SPLITS, BLOCK_N, BLOCK_K):
    """First reachable slot, end of the tree, and keys a split, of the row with this prefix and
    these positions of its queries."""
    end = tl.minimum(length + M, C)
    first = 0
    if WINDOW:
        # no query looks further back than the one that stands lowest (in one load, as a loop here
        # would keep the compiler from pipelining the main one)
        index = tl.arange(0, BLOCK_N)
        at = tl.load(places + index, mask=index < N, other=2**62)
        begin = tl.min(at, axis=0) - window + 1
        first = tl.minimum(tl.maximum(begin, 0), length.to(tl.int64)).to(tl.int32)
    size = tl.maximum(tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_K) * BLOCK_K, SPLIT)
    return first, end, size


@triton.jit
def _attend_split(
    q,
    k_cache,
    v_cache,
    rows,
    lengths,
    bits,
    positions,
    part_acc,
    part_best,
    part_total,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_c,
    v_b,
    v_h,
    v_c,
    bits_b,
    bits_n,
    positions_b,
    N,
    M,
    W,
    C,
    window,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (splits x tiles, Hkv, B): BLOCK_R tile rows against one split of the keys.

    Writes, at [split, b, kv head, tile row]: the largest score (base 2), the weights' sum and the
    weighted values' sum, both relative to it."""
    kv, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(N * G, BLOCK_R)
    # tiles of one split run side by side and share its keys in the L2 cache
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    length = tl.load(lengths + row).to(tl.int32)
    places = positions + row * positions_b + (M - N)
    first, end, size = _span(
        length, places, N, M, C, window, WINDOW, SPLIT, SPLITS, BLOCK_N, BLOCK_K
    )
    low = first + split * size
    if low >= end:
        return
    high = tl.minimum(low + size, end)

    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < N * G
    query, head = r // G, kv * G + r % G
    channel = tl.arange(0, BLOCK_D)
    q_tile = tl.load(
        q + row * q_b + head[:, None] * q_h + query[:, None] * q_n + channel[None, :],
        mask=live[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    words = bits + row * bits_b + query * bits_n
    positions += row * positions_b
    seen_from = query
    if WINDOW:  # a key is seen at positions above this one
        seen_from = (tl.load(places + query, mask=live, other=0) - window).to(tl.int32)
    place = row  # in the cache
    if ROWS:
        place = tl.load(rows + row)
    keys, values = k_cache + place * k_b + kv * k_h, v_cache + place * v_b + kv * v_h

    best = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    border = tl.minimum(tl.maximum(low, length), high)  # prefix below, tree from here
    BLOCK_T: tl.constexpr = min(BLOCK_K, 32)
    for TREE in tl.static_range(2):  # few blocks lie in the tree: no pipeline
        index = tl.arange(0, BLOCK_T if TREE else BLOCK_K)
        begin = border if TREE else low
        stop = high if TREE else border
        for start in tl.range(
            begin, stop, BLOCK_T if TREE else BLOCK_K, num_stages=1 if TREE else 2
        ):
            slot = start + index
            inside = slot < stop
            mask = inside[:, None] & (channel < D)[None, :]
            # the block's address in 64 bits, offsets inside the block in 32. What is out of reach
            # is never loaded: it may hold NaN
            base = start + tl.zeros((), tl.int64)
            at = keys + base * k_c + index[:, None] * k_c + channel[None, :]
            k = tl.load(at, mask=mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                # tanh by an exponential that cannot overflow; scale already holds 1 / softcap
                decay = tl.exp2(tl.abs(scores) * -2.8853900817779268)
                scores = softcap * tl.where(scores < 0, decay - 1, 1 - decay) / (1 + decay)
            visible = inside[None, :] & live[:, None]
            if TREE:
                # the block's bits, which two words hold between them, as one word
                node = start - length
                word, shift = node // 32, (node % 32).to(tl.uint32)
                below = tl.load(words + word, mask=live, other=0).to(tl.uint32, bitcast=True)
                above = tl.load(words + tl.minimum(word + 1, W - 1), mask=live, other=0)
                above = above.to(tl.uint32, bitcast=True)
                block = (below >> shift) | ((above << 1) << (31 - shift))  # not by 32: undefined
                seen = (block[:, None] >> index.to(tl.uint32)[None, :]) & 1
                visible = visible & (seen != 0)
            if WINDOW:
                here = slot
                if TREE:
                    here = tl.load(positions + (slot - length), mask=inside, other=0).to(tl.int32)
                visible = visible & (here[None, :] > seen_from[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            level = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
            fade = tl.exp2(best - level)
            weights = tl.exp2(scores - level[:, None])
            total = total * fade + tl.sum(weights, axis=1)
            at = values + base * v_c + index[:, None] * v_c + channel[None, :]
            v = tl.load(at, mask=mask, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
            best = higher

    R = N * G
    at = ((split * tl.num_programs(2) + row) * tl.num_programs(1) + kv) * R + r
    tl.store(part_best + at, best, mask=live)
    tl.store(part_total + at, total, mask=live)
    tl.store(
        part_acc + at[:, None] * D + channel[None, :],
        acc,
        mask=live[:, None] & (channel < D)[None, :],
    )


@triton.jit
def _merge(
    part_acc,
    part_best,
    part_total,
    lengths,
    positions,
    sinks,
    out,
    out_b,
    out_n,
    out_h,
    positions_b,
    N,
    M,
    C,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (tiles, Hkv, B): the splits of BLOCK_R tile rows, and the sinks, in one softmax."""
    kv, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    places = positions + row * positions_b + (M - N)
    first, end, size = _span(
        length, places, N, M, C, window, WINDOW, SPLIT, SPLITS, BLOCK_N, BLOCK_K
    )
    R = N * G
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < R
    query, head = r // G, kv * G + r % G
    channel = tl.arange(0, BLOCK_D)
    wide = live[:, None] & (channel < D)[None, :]
    best = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    if SINKS:
        best = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.where(best == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for split in range(0, tl.cdiv(end - first, size)):
        at = ((split * tl.num_programs(2) + row) * tl.num_programs(1) + kv) * R + r
        top = tl.load(part_best + at, mask=live, other=float("-inf"))
        higher = tl.maximum(best, top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weight = tl.exp2(best - shift), tl.exp2(top - shift)
        total = total * fade + weight * tl.load(part_total + at, mask=live, other=0.0)
        part = tl.load(part_acc + at[:, None] * D + channel[None, :], mask=wide, other=0.0)
        acc = acc * fade[:, None] + weight[:, None] * part
        best = higher
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = out + row * out_b + query[:, None] * out_n + head[:, None] * out_h + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=wide)


def tree_attention_triton(
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
    """`kernels.tree_attention.tree_attention` without host synchronisation. fp16, bf16 or fp32.

    Scratch: min(MAX_SPLITS, ceil(C / MIN_SPLIT)) * B * Hq * N * (D + 2) floats."""
    B, Hq, N, D = q.shape
    Hkv, C = k_cache.shape[1], k_cache.shape[2]
    M = tree_positions.shape[1]
    assert k_cache.shape == v_cache.shape and k_cache.shape[1:] == (Hkv, C, D) and Hq % Hkv == 0
    assert (
        k_cache.shape[0] == B
        if rows is None
        else (rows.shape == (B,) and rows.dtype == torch.int64)
    )
    assert q.dtype == k_cache.dtype == v_cache.dtype and lengths.shape == (B,)
    assert 1 <= N <= M <= C and tree_positions.shape == (B, M)
    assert tree_bits.shape == (B, N, triton.cdiv(M, 32)) and tree_bits.dtype == torch.int32
    assert lengths.dtype == tree_positions.dtype == torch.int64 and lengths.is_contiguous()
    assert k_cache.stride(3) == v_cache.stride(3) == 1
    assert sliding_window is None or sliding_window >= 1
    assert sinks is None or (sinks.shape == (Hq,) and sinks.is_contiguous())
    q = q if q.stride(3) == 1 else q.contiguous()
    tree_bits = tree_bits if tree_bits.stride(2) == 1 else tree_bits.contiguous()
    tree_positions = (
        tree_positions if tree_positions.stride(1) == 1 else tree_positions.contiguous()
    )
    G = Hq // Hkv
    single = q.dtype == torch.float32

    block_d = max(16, triton.next_power_of_2(D))
    # keys a block: a function of dtype and D alone, since sums depend on it
    block_k = max(16, min(64, 8192 // block_d) // (2 if single else 1))
    # more rows of fp32 (three tf32 products each), or of very wide heads, overflow the registers
    most = 16 if single else 64 if block_d <= 256 else 32
    block_r = min(most, max(16, triton.next_power_of_2(N * G)))
    splits = min(MAX_SPLITS, triton.cdiv(C, MIN_SPLIT))
    part_acc = torch.empty((splits, B, Hq * N, D), dtype=torch.float32, device=q.device)
    part_best, part_total = torch.empty(
        (2, splits, B, Hq * N), dtype=torch.float32, device=q.device
    )
    out = torch.empty((B, N, Hq, D), dtype=q.dtype, device=q.device)
    window = 0 if sliding_window is None else sliding_window
    shared = dict(
        G=G,
        D=D,
        WINDOW=sliding_window is not None,
        SPLIT=MIN_SPLIT,
        SPLITS=MAX_SPLITS,
        BLOCK_N=1 if sliding_window is None else triton.next_power_of_2(N),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
    )
    inputs = q, k_cache, v_cache, lengths if rows is None else rows, lengths, tree_bits
    parts = part_acc, part_best, part_total
    strides = (*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3])
    strides = (*strides, *tree_bits.stride()[:2], tree_positions.stride(0))
    scale = scaling * LOG2E if softcap is None else scaling / softcap
    scales = scale, 0.0 if softcap is None else softcap * LOG2E
    words = tree_bits.shape[2]
    _attend_split[(splits * triton.cdiv(N * G, block_r), Hkv, B)](
        *(*inputs, tree_positions, *parts, *strides, N, M, words, C, window, *scales),
        SOFTCAP=softcap is not None,
        ROWS=rows is not None,
        PRECISION="tf32x3" if single else "tf32",
        BLOCK_R=block_r,
        num_warps=4 if block_d <= 128 else 8,
        num_stages=2,
        **shared,
    )
    block_r = min(8, triton.next_power_of_2(N * G))
    ends = lengths, tree_positions, out if sinks is None else sinks, out
    strides = (*out.stride()[:3], tree_positions.stride(0))
    _merge[(triton.cdiv(N * G, block_r), Hkv, B)](
        *(*parts, *ends, *strides, N, M, C, window),
        SINKS=sinks is not None,
        BLOCK_R=block_r,
        num_warps=4,
        **shared,
    )
    return out
