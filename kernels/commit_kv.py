"""Moving accepted key/value slots to the front: plain-PyTorch reference.

L layers, B rows, H key/value heads, C capacity, D head_dim, K longest path."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.grow_tree import fast


def commit_kv(
    buffer: torch.Tensor, lengths: torch.Tensor, path: torch.Tensor, counts: torch.Tensor
) -> None:
    """In place: slot lengths[b]+j takes what slot lengths[b]+path[b, j] held, for j < counts[b].

    buffer [L, 2, B, H, C, D] (keys and values of all layers); lengths, counts [B] int64; path [B,
    K] int64, tree nodes. Sources are read before anything is written, so overlapping moves are
    safe. Slots at or past lengths[b] + counts[b] keep what they held."""
    implementation = commit_kv_reference
    if use_triton(buffer):
        from kernels.triton_commit_kv import commit_kv_triton as implementation
    elif fast(buffer):
        implementation = torch.ops.eagle_cpu.commit_kv
    implementation(buffer, lengths, path, counts)


def commit_kv_reference(
    buffer: torch.Tensor, lengths: torch.Tensor, path: torch.Tensor, counts: torch.Tensor
) -> None:
    """The specification of `commit_kv`, in plain PyTorch."""
    B, K = path.shape
    step = torch.arange(K, device=path.device)[None]
    source = lengths[:, None] + torch.where(step < counts[:, None], path, step)  # [B, K]
    target = lengths[:, None] + step
    if B == 1:
        moved = buffer.index_select(4, source[0])
        buffer.index_copy_(4, target[0], moved)
        return
    rows = torch.arange(B, device=path.device)[:, None]
    # advanced indices on dims 2 and 4 come to the front: [B, K, L, 2, H, D]
    buffer[:, :, rows, :, target] = buffer[:, :, rows, :, source]
