"""The choice kernel against its reference: the same tokens, in every mix of parameters."""

import pytest
import torch

from kernels.choose import choose_reference, gumbel_noise
from kernels.triton_choose import choose_triton

GRID = dict(
    temperature=[0.7, 2.0], top_k=[0, 1, 5, 70, 2000], top_p=[0.0, 0.05, 0.7], min_p=[0.0, 0.1]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Less work for the interpreter, where a vocabulary fills no block."""
    import kernels.triton_choose as module

    monkeypatch.setattr(module, "SETTLE_BLOCK", 1024)


def logits_of(kind, B, N, V, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, N, V, generator=g) * 3
    if kind == "ties":
        logits = logits.round() / 2
    if kind == "few":  # most tokens are forbidden; fewer are left than top-k asks for
        logits = logits.masked_fill(torch.rand(B, N, V, generator=g) < 0.97, float("-inf"))
    if kind == "flat":
        logits = logits * 0 - 0.0
        logits[..., ::2] = 0.0  # zeros of both signs are equal
    return logits


def check(logits, seed=0, **parameters):
    B, N, V = logits.shape
    g = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (B,), generator=g)
    positions = torch.randint(0, 10**6, (B, N), generator=g)
    got = choose_triton(logits, seeds, positions, **parameters)
    expected = choose_reference(logits, seeds, positions, **parameters)
    assert got.dtype == torch.int64 and got.shape == (B, N)
    assert torch.equal(got, expected), parameters
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 63, 1500])
def test_greedy(V, dtype):
    logits = logits_of("ties", 2, 3, V).to(dtype)
    got = check(logits)
    for b in range(2):
        for n in range(3):
            assert got[b, n] == (logits[b, n] == logits[b, n].max()).nonzero()[0, 0]
    assert (check(logits_of("flat", 1, 2, V)) == 0).all()


@pytest.mark.parametrize("V", [2, 63, 1500])
def test_pure_sampling(V):
    check(logits_of("normal", 2, 2, V), temperature=0.8)


@pytest.mark.parametrize("kind, V", [("normal", 63), ("ties", 500), ("few", 500), ("flat", 63)])
def test_mixed_rows(kind, V):
    """Every combination of parameters, one a row, and a greedy row for each."""
    rows = torch.cartesian_prod(*(torch.tensor(values).float() for values in GRID.values()))
    rows = torch.cat([rows, torch.tensor([[0.0, 5, 0.5, 0.1], [0.0, 0, 0, 0]])])
    columns = dict(zip(GRID, rows.T, strict=True))
    columns["top_k"] = columns["top_k"].long()
    check(logits_of(kind, len(rows), 1, V), **columns)


CUTS = [
    dict(temperature=0.7, top_k=20, top_p=0.95),
    dict(temperature=1.0, min_p=0.2),
    dict(temperature=1.1, top_k=50, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("parameters", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_numbers(parameters, kind):
    logits = logits_of(kind, 2, 2, 1000, seed=3)
    got = check(logits, **parameters)
    half = check(logits.half(), **parameters)
    tensors = {
        name: torch.full((2,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in parameters.items()
    }
    assert torch.equal(check(logits, **tensors), got)
    assert torch.equal(check(logits.half(), **tensors), half)


def test_many_seeds_reach_every_kept_token():
    """Rare tries: with much of the mass cut away, candidates are refused again and again."""
    logits = torch.arange(40.0).flip(0).mul(0.01).expand(40, 1, 40)
    got = check(logits, temperature=1.0, top_k=4)
    assert got.unique().tolist() == [0, 1, 2, 3]
    got = check(logits, temperature=1.0, top_k=20, top_p=0.1)
    assert got.unique().tolist() == [0, 1]


def test_the_cut_of_a_vocabulary_does_not_matter(monkeypatch):
    import kernels.triton_choose as module

    logits = logits_of("ties", 1, 2, 700)
    one = check(logits, temperature=0.9, top_p=0.8), check(logits)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "SETTLE_BLOCK", 64)
    assert torch.equal(check(logits, temperature=0.9, top_p=0.8), one[0])
    assert torch.equal(check(logits), one[1])


def test_strided_logits():
    logits = logits_of("normal", 3, 7, 12)
    for view in (logits[1:, ::2, :10], logits.transpose(1, 2)):
        check(view, temperature=0.9, top_k=9)
        check(view)


@pytest.mark.parametrize("parameters", [{}, dict(temperature=1.0), *CUTS], ids=str)
def test_a_poisoned_row_ends_in_range_and_alone(parameters):
    logits = logits_of("normal", 5, 1, 63)
    seeds, positions = torch.arange(5), torch.arange(5)[:, None]
    clean = choose_triton(logits, seeds, positions, **parameters)
    logits[0] = float("nan")
    logits[1, 0, 5:] = float("nan")
    logits[2] = float("-inf")
    logits[3, 0, 7] = float("inf")
    got = choose_triton(logits, seeds, positions, **parameters)
    assert ((got >= 0) & (got < 63)).all() and got[0] == 0 and got[1] < 5 and got[3] == 7
    assert got[4] == clean[4]


def test_noise_bits():
    """The kernel's uniforms are the reference's: on flat logits the choice is the noise's own
    argmax."""
    seeds, positions = torch.tensor([0, -1, 2**63 - 1, 5 - 2**63]), torch.tensor([[0, 2**33]] * 4)
    logits = torch.zeros(4, 2, 1000)
    got = choose_triton(logits, seeds, positions, temperature=1.0)
    assert torch.equal(got, gumbel_noise(seeds, positions, 1000).argmax(-1))
