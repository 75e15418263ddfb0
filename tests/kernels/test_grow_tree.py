"""The C++ that grows draft trees against the plain-PyTorch references, decision for decision;
eagle/test_tree.py has what is done with grown ones."""

import pytest
import torch

from eagle.loading import compiled_folder
from kernels import cpu_extension
from kernels.grow_tree import best_beams, candidates


@pytest.fixture
def both(monkeypatch):
    """both(work) -> what the C++ gives, and what the reference gives."""
    cpu_extension.load(compiled_folder())

    def run(work):
        fast = work()
        with monkeypatch.context() as patch:
            patch.setattr(cpu_extension, "loaded", False)
            return fast, work()

    return run


@pytest.mark.parametrize(
    "b, n, k, D", [(1, 1, 1, 3), (1, 4, 4, 63), (3, 10, 10, 500), (5, 2, 7, 7)]
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_candidates(both, b, n, k, D, first):
    g = torch.Generator().manual_seed(b + n)
    log_probs = torch.randn(b, n, D, generator=g).log_softmax(-1)
    to_target = torch.randperm(3 * D, generator=g)[:D]
    scores = None if first else -torch.rand(b, n, generator=g)
    fast, slow = both(lambda: candidates(log_probs, scores, to_target, k))
    assert all(torch.equal(x, y) for x, y in zip(fast, slow, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b, m, k, M", [(1, 1, 4, 0), (3, 4, 4, 9), (2, 10, 10, 70), (4, 3, 1, 5)])
def test_best_beams(both, b, m, k, M, dtype):
    g = torch.Generator().manual_seed(b + m)
    scores = -torch.rand(b, m * k, generator=g)
    tokens = torch.randint(0, 999, (b, m * k), generator=g)
    hidden = torch.randn(b, m, 13, generator=g).to(dtype)
    seen = torch.rand(b, m, M, generator=g) < 0.5
    fast, slow = both(lambda: best_beams(scores, tokens, hidden, seen, k))
    assert all(torch.equal(x, y) for x, y in zip(fast, slow, strict=True))
