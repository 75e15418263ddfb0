"""Moving accepted key/value slots to the front: Triton.

    buffer[l, s, b, h, lengths[b] + j] <- buffer[l, s, b, h, lengths[b] + path[b, j]]   for j <
    counts[b]

One launch moves the keys and values of all layers. The specification is
`kernels.commit_kv.commit_kv_reference`.

L layers, B rows, H key/value heads, C capacity, D head_dim, K longest path."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _move(
    buffer,
    lengths,
    path,
    counts,
    stride_l,
    stride_s,
    stride_b,
    stride_h,
    stride_c,
    path_b,
    H,
    D,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns the slots of one (layer, key or value, row, head) in BLOCK_D channels, so
    nothing that it reads is written by another."""
    chunks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = ((pid // chunks) % H).to(tl.int64)
    side = ((pid // chunks // H) % 2).to(tl.int64)
    layer = (pid // chunks // H // 2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + row)
    if count <= 0:
        return
    step = tl.arange(0, BLOCK_K)
    node = tl.load(path + row * path_b + step, mask=step < K, other=0)
    moves = (step < K) & (step < count) & (node != step)
    channel = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    # 64-bit addresses throughout: the buffer of a large model has more than 2^31 elements
    front = (
        buffer
        + layer * stride_l
        + side * stride_s
        + row * stride_b
        + head * stride_h
        + tl.load(lengths + row) * stride_c
    )
    mask = moves[:, None] & (channel < D)[None, :]
    source = front + node[:, None] * stride_c + channel[None, :]
    target = front + step.to(tl.int64)[:, None] * stride_c + channel[None, :]
    moved = tl.load(source, mask=mask)
    # one thread's target may be another's source: every load is done before any store begins
    tl.debug_barrier()
    tl.store(target, moved, mask=mask)


def commit_kv_triton(
    buffer: torch.Tensor, lengths: torch.Tensor, path: torch.Tensor, counts: torch.Tensor
) -> None:
    """`kernels.commit_kv.commit_kv` without host synchronisation; K <= 64. The buffer may be
    strided in all dimensions but the last."""
    L, two, B, H, C, D = buffer.shape
    K = path.shape[1]
    assert two == 2 and path.shape[0] == B and lengths.shape == counts.shape == (B,)
    assert lengths.dtype == path.dtype == counts.dtype == torch.int64
    assert buffer.stride(5) == 1 and path.stride(1) == 1 and K <= 64
    assert lengths.is_contiguous() and counts.is_contiguous()
    block_k = triton.next_power_of_2(K)
    # 4096 elements a program at most: 32 a thread
    block_d = min(triton.next_power_of_2(D), max(16, 4096 // block_k))
    grid = (L * 2 * H * triton.cdiv(D, block_d), B)
    _move[grid](
        buffer,
        lengths,
        path,
        counts,
        *buffer.stride()[:5],
        path.stride(0),
        H,
        D,
        K,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=4,
    )
