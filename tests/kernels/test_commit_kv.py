"""Moving accepted slots against a loop that copies first: the reference, the C++, and in the
interpreter's process the kernel."""

import os

import pytest
import torch
from kernel_helpers import commit_problem

from eagle.loading import compiled_folder
from kernels import cpu_extension
from kernels.commit_kv import commit_kv

INTERPRETED = os.environ.get("EAGLE_TRITON") == "1"


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "c++"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "c++":
        cpu_extension.load(compiled_folder())
    monkeypatch.setattr(cpu_extension, "loaded", request.param == "c++")


def check(buffer, lengths, path, counts):
    expected = buffer.clone()
    for b in range(buffer.shape[2]):
        for j in range(int(counts[b])):
            expected[:, :, b, :, lengths[b] + j] = buffer[:, :, b, :, lengths[b] + path[b, j]]
    commit_kv(buffer, lengths, path, counts)
    assert torch.equal(buffer.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, D, K", [(1, 4, 1), (1, 5, 5), (3, 7, 5), (2, 80, 13), (2, 300, 9)])
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "any-order"])
def test_against_a_loop(rows, D, K, dtype, rising):
    check(*commit_problem(rows, D, K, dtype, seed=rows + K, rising=rising))


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
    lengths, nothing = torch.full((rows,), 4), torch.zeros(rows, 4, dtype=torch.int64)
    check(buffer, lengths, nothing, nothing[:, 0].contiguous())
    check(buffer, lengths, torch.tensor([[0, 3, 0, 0]] * rows), torch.full((rows,), 2))
