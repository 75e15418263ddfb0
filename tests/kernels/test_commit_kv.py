"""Moving accepted slots against a loop that copies first."""

import pytest
import torch

from eagle.compile import compiled_folder, cpu_flags
from kernels import cpu_extension
from kernels.commit_kv import commit_kv


@pytest.fixture(params=["reference", "c++"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "c++":
        cpu_extension.load(compiled_folder(), cpu_flags())
    monkeypatch.setattr(cpu_extension, "loaded", request.param == "c++")


def slow(buffer, lengths, path, counts):
    out = buffer.clone()
    for b in range(buffer.shape[2]):
        for j in range(int(counts[b])):
            out[:, :, b, :, lengths[b] + j] = buffer[:, :, b, :, lengths[b] + path[b, j]]
    return out


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_loop(rows, seed):
    g = torch.Generator().manual_seed(seed)
    K, nodes = 5, 12
    buffer = torch.randn(3, 2, rows, 2, 30, 4, generator=g)
    lengths = torch.randint(0, 30 - nodes, (rows,), generator=g)
    counts = torch.randint(0, K + 1, (rows,), generator=g)
    # a path rises, begins at the root, and is padded with zeros
    path = torch.stack(
        [torch.randperm(nodes - 1, generator=g)[:K].sort().values + 1 for _ in range(rows)]
    )
    path[:, 0] = 0
    path[torch.arange(K)[None] >= counts[:, None]] = 0
    expected = slow(buffer, lengths, path, counts)
    commit_kv(buffer, lengths, path, counts)
    assert torch.equal(buffer, expected)


def test_overlapping_moves_read_before_they_write():
    buffer = torch.arange(8.0).reshape(1, 1, 1, 1, 8, 1).repeat(1, 2, 2, 1, 1, 1)
    path, counts = torch.tensor([[0, 2, 3, 4], [0, 3, 1, 2]]), torch.tensor([4, 4])
    commit_kv(buffer, torch.tensor([2, 3]), path, counts)
    assert buffer[0, 0, 0, 0, :, 0].tolist() == [0, 1, 2, 4, 5, 6, 6, 7]
    assert buffer[0, 1, 1, 0, :, 0].tolist() == [0, 1, 2, 3, 6, 4, 5, 7]


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_accepted_changes_nothing_and_nan_stays_away(rows):
    buffer = torch.randn(2, 2, rows, 1, 12, 3)
    buffer[:, :, :, :, 8:] = float("nan")
    before = buffer.clone()
    lengths = torch.full((rows,), 4)
    nothing = torch.zeros(rows, 4, dtype=torch.int64)
    commit_kv(buffer, lengths, nothing, nothing[:, 0])
    assert torch.equal(buffer.nan_to_num(9), before.nan_to_num(9))
    commit_kv(buffer, lengths, torch.tensor([[0, 3, 0, 0]] * rows), torch.full((rows,), 2))
    assert torch.equal(buffer[..., 5, :], before[..., 7, :])
    assert torch.equal(buffer[..., 6:, :].nan_to_num(9), before[..., 6:, :].nan_to_num(9))
