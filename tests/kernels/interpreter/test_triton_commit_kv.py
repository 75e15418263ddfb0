"""The commit kernel against its reference, bit for bit."""

import pytest
import torch

from kernels.commit_kv import commit_kv_reference
from kernels.triton_commit_kv import commit_kv_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, D, K", [(1, 4, 1), (3, 7, 5), (2, 80, 13), (2, 300, 9)])
def test_against_the_reference(rows, D, K, dtype):
    g = torch.Generator().manual_seed(rows)
    nodes = K + 8
    buffer = torch.randn(3, 2, rows, 2, nodes + 9, D, generator=g).to(dtype)
    lengths = torch.randint(0, 10, (rows,), generator=g)
    lengths[0] = 0
    counts = torch.randint(0, K + 1, (rows,), generator=g)
    counts[0] = K
    path = torch.stack([torch.randperm(nodes - 1, generator=g)[:K] + 1 for _ in range(rows)])
    path[:, ::2] = path[:, ::2].sort().values  # some rise, some do not
    path[torch.arange(K)[None] >= counts[:, None]] = 2**40  # padding is never looked at
    expected = buffer.clone()
    commit_kv_reference(expected, lengths, path, counts)
    commit_kv_triton(buffer, lengths, path, counts)
    assert torch.equal(buffer, expected)


def test_overlapping_moves_read_before_they_write():
    buffer = torch.arange(8.0).reshape(1, 1, 1, 1, 8, 1).repeat(1, 2, 2, 1, 1, 1)
    path, counts = torch.tensor([[0, 2, 3, 4], [0, 3, 1, 2]]), torch.tensor([4, 4])
    commit_kv_triton(buffer, torch.tensor([2, 3]), path, counts)
    assert buffer[0, 0, 0, 0, :, 0].tolist() == [0, 1, 2, 4, 5, 6, 6, 7]
    assert buffer[0, 1, 1, 0, :, 0].tolist() == [0, 1, 2, 3, 6, 4, 5, 7]


def test_a_strided_buffer_and_path():
    """A view of some layers and rows, in a capacity that is not the whole's; NaN stays where it
    is."""
    whole = torch.randn(4, 2, 5, 2, 40, 6)
    whole[:, :, :, :, 20:] = float("nan")
    expected = whole.clone()
    lengths, counts = torch.tensor([3, 8, 0]), torch.tensor([2, 0, 3])
    path = torch.tensor([[9, 1, 4, 0], [9, 1, 4, 0], [9, 0, 5, 11]])[:, 1:]
    commit_kv_triton(whole[1:, :, 1:4, :, :30], lengths, path, counts)
    commit_kv_reference(expected[1:, :, 1:4, :, :30], lengths, path, counts)
    assert torch.equal(whole.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(whole[1, 0, 3, 0, 2], expected[1, 0, 3, 0, 11])
