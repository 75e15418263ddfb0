"""Moving accepted key/value slots to the front: plain-PyTorch reference.

L layers, B rows, H key/value heads, C capacity, D head_dim, K longest path."""

from __future__ import annotations

import torch

from kernels.dispatch import dispatched


def commit_kv_reference(
    buffer: torch.Tensor, lengths: torch.Tensor, path: torch.Tensor, counts: torch.Tensor
) -> None:
    """In place: slot lengths[b]+j takes what slot lengths[b]+path[b, j] held, for j < counts[b].

    buffer [L, 2, B, H, C, D] (keys and values of all layers); lengths, counts [B] int64; path [B,
    K] int64, tree nodes. Sources are read before anything is written, so overlapping moves are
    safe. Slots at or past lengths[b] + counts[b] keep what they held."""
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


commit_kv = dispatched(commit_kv_reference, "triton_commit_kv", "commit_kv_triton", "commit_kv")
