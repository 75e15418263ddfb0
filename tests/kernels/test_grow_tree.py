"""The C++ bookkeeping of draft trees against the plain-PyTorch references, decision for
decision."""

import pytest
import torch

from eagle.compile import compiled_folder, cpu_flags
from eagle.tree import ancestors, rerank
from eagle.verify import verify
from kernels import cpu_extension
from kernels.grow_tree import best_beams, candidates


@pytest.fixture
def both(monkeypatch):
    """both(work) -> what the C++ gives, and what the reference gives."""
    cpu_extension.load(compiled_folder(), cpu_flags())

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


def forest(b, k, depth, seed):
    """Candidates as a drafter makes them: levels of k beams, scores falling from parent to
    child."""
    g = torch.Generator().manual_seed(seed)
    parents, scores, levels = (
        [torch.zeros(b, k, dtype=torch.int64)],
        [-torch.rand(b, k, generator=g)],
        [1] * k,
    )
    base, width = 1, k
    for step in range(depth):
        pick = torch.stack([torch.randperm(width, generator=g)[:k] for _ in range(b)])
        above = scores[-1].gather(1, pick)
        parents.append((base + pick).repeat_interleave(k, 1))
        scores.append((above[..., None] - torch.rand(b, k, k, generator=g)).flatten(1))
        levels += [step + 2] * (k * k)
        base, width = base + width, k * k
    parents, scores = torch.cat(parents, 1), torch.cat(scores, 1)
    tokens = torch.randint(0, 50, parents.shape, generator=g)
    return torch.arange(b), tokens, parents, scores, torch.tensor(levels)


FORESTS = [(1, 1, 4, 6), (2, 4, 4, 16), (3, 10, 6, 60), (2, 3, 0, 3)]


@pytest.mark.parametrize("b, k, depth, nodes", FORESTS)
def test_rerank(both, b, k, depth, nodes):
    root, tokens, parents, scores, levels = forest(b, k, depth, b + k)
    fast, slow = both(lambda: rerank(root, tokens, parents, scores, levels, nodes, depth + 1))
    for name in ("tokens", "parents", "depth", "scores", "mask"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name


@pytest.mark.parametrize("seed", range(6))
def test_verify(both, seed):
    g = torch.Generator().manual_seed(seed)
    b, k, depth = 1 + seed, 3, 4
    tree = rerank(*forest(b, k, depth, seed), 20, depth + 1)
    # distinct children, so that one at most is right, and choices that often follow the tree
    tree.tokens = torch.arange(tree.tokens.shape[1]).expand(b, -1).clone()
    assert torch.equal(tree.mask, ancestors(tree.parents, depth + 1))
    choices = torch.full_like(tree.tokens, 999)
    for row in range(b):
        for node in range(1, tree.tokens.shape[1]):
            if torch.rand((), generator=g) < 0.8:
                choices[row, tree.parents[row, node]] = tree.tokens[row, node]
    fast, slow = both(lambda: verify(tree, choices, depth + 1))
    assert torch.equal(fast.num_accepted, slow.num_accepted)
    assert seed == 0 or fast.num_accepted.max() > 1
    for row, n in enumerate(fast.num_accepted.tolist()):
        assert torch.equal(fast.path[row, : n + 1], slow.path[row, : n + 1])
        assert torch.equal(fast.tokens[row, : n + 1], slow.tokens[row, : n + 1])
