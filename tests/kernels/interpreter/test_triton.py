"""What the kernels alone have: chunks, splits and views that no result depends on, and poison."""

import pytest
import torch
from kernel_helpers import LOSSES, PARAMETERS, attention_problem, options_of, row_alone

import kernels.triton_choose
import kernels.triton_tree_attention as attention
from kernels.choose import choose, choose_reference, gumbel_noise
from kernels.commit_kv import commit_kv, commit_kv_reference
from kernels.draft_loss import Objective, tile_loss
from kernels.tile_loss import tile_loss_reference
from kernels.tree_attention import tree_attention, tree_attention_reference
from kernels.triton_tree_attention import tree_attention_triton

CLOSE = {torch.float32: dict(atol=2e-5, rtol=1e-4), torch.float16: dict(atol=2e-3, rtol=1e-2)}
GRID = dict(temperature=[0.7], top_k=[0, 1, 5, 70, 2000], top_p=[0.0, 0.05, 0.7], min_p=[0.0, 0.1])
CUTS = [dict(temperature=0.7, top_k=20, top_p=0.95), dict(temperature=1.0, min_p=0.2)]


def test_the_public_functions_dispatch(monkeypatch):
    arguments = attention_problem([3], N=2, M=2, D=8)
    expected = tree_attention_reference(*arguments, scaling=0.3)
    monkeypatch.setattr(attention, "tree_attention_triton", lambda *a, **k: "the kernel")
    assert tree_attention(*arguments, scaling=0.3) == "the kernel"
    monkeypatch.setenv("EAGLE_TRITON", "0")
    assert torch.equal(tree_attention(*arguments, scaling=0.3), expected)


# --- choose


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


def check_choice(logits, **parameters):
    B, N, _ = logits.shape
    g = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**62), 2**62, (B,), generator=g)
    positions = torch.randint(0, 10**6, (B, N), generator=g)
    got = choose(logits, seeds, positions, **parameters)
    assert torch.equal(got, choose_reference(logits, seeds, positions, **parameters)), parameters
    return got


@pytest.mark.parametrize("V", [1, 63, 1100])
def test_greedy_and_pure_sampling(V):
    for logits in (logits_of("ties", 2, 3, V), logits_of("ties", 2, 3, V).half()):
        check_choice(logits)
    assert (check_choice(logits_of("flat", 1, 2, V)) == 0).all()
    check_choice(logits_of("normal", 2, 2, V), temperature=0.8)


@pytest.mark.parametrize("kind, V", [("normal", 63), ("ties", 300), ("few", 300), ("flat", 63)])
def test_mixed_rows(kind, V):
    """Every combination of parameters, one a row, and a greedy row for each."""
    rows = torch.cartesian_prod(*(torch.tensor(values).float() for values in GRID.values()))
    rows = torch.cat([rows, torch.tensor([[0.0, 5, 0.5, 0.1], [0.0, 0, 0, 0]])])
    columns = dict(zip(GRID, rows.T, strict=True))
    columns["top_k"] = columns["top_k"].long()
    check_choice(logits_of(kind, len(rows), 1, V), **columns)


def test_the_cut_of_a_vocabulary_does_not_matter(monkeypatch):
    logits = logits_of("ties", 6, 1, 300)
    for parameters in ({}, PARAMETERS):
        expected = check_choice(logits, **parameters)
        check_choice(logits.half(), **parameters)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.triton_choose, "BLOCK", 16)
            patch.setattr(kernels.triton_choose, "SETTLE_BLOCK", 64)
            assert torch.equal(check_choice(logits, **parameters), expected)


def test_strided_logits():
    logits = logits_of("normal", 3, 7, 12)
    for view in (logits[1:, ::2, :10], logits.transpose(1, 2)):
        check_choice(view, temperature=0.9, top_k=9)
        check_choice(view)


@pytest.mark.parametrize("parameters", [{}, dict(temperature=1.0), *CUTS], ids=str)
def test_a_poisoned_row_ends_in_range_and_alone(parameters):
    logits = logits_of("normal", 5, 1, 63)
    seeds, positions = torch.arange(5), torch.arange(5)[:, None]
    clean = choose(logits, seeds, positions, **parameters)
    logits[0] = float("nan")
    logits[1, 0, 5:] = float("nan")
    logits[2] = float("-inf")
    logits[3, 0, 7] = float("inf")
    got = choose(logits, seeds, positions, **parameters)
    assert ((got >= 0) & (got < 63)).all() and got[0] == 0 and got[1] < 5 and got[3] == 7
    assert got[4] == clean[4]


def test_noise_bits():
    """The kernel's uniforms are the reference's: on flat logits the choice is the noise's own
    argmax."""
    seeds, positions = torch.tensor([0, -1, 2**63 - 1, 5 - 2**63]), torch.tensor([[0, 2**33]] * 4)
    got = choose(torch.zeros(4, 2, 1000), seeds, positions, temperature=1.0)
    assert torch.equal(got, gumbel_noise(seeds, positions, 1000).argmax(-1))


# --- commit_kv and tile_loss


def test_a_strided_buffer_and_path():
    """A view of some layers and rows, in a capacity that is not the whole's; NaN stays where it
    is, and the padding of a path is never looked at."""
    whole = torch.randn(4, 2, 5, 2, 40, 6)
    whole[:, :, :, :, 20:] = float("nan")
    expected = whole.clone()
    lengths, counts = torch.tensor([3, 8, 0]), torch.tensor([2, 0, 3])
    path = torch.tensor([[9, 1, 4, 2**40], [9, 1, 4, 0], [9, 0, 5, 11]])[:, 1:]
    commit_kv(whole[1:, :, 1:4, :, :30], lengths, path, counts)
    commit_kv_reference(expected[1:, :, 1:4, :, :30], lengths, path, counts)
    assert torch.equal(whole.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(whole[1, 0, 3, 0, 2], expected[1, 0, 3, 0, 11])


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_of_a_tile(loss):
    g, objective = torch.Generator().manual_seed(0), Objective(loss)
    logits, importance = torch.randn(2, 2, 150, generator=g).half(), torch.rand(2, 2, generator=g)
    teacher = 2 * torch.randn(2, 150, generator=g).half()
    expected = tile_loss_reference(logits.clone(), teacher, importance, objective, True)
    found = tile_loss(logits.clone(), teacher, importance, objective, True)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_the_best_token_is_the_first_of_equals_and_without_gradients_logits_stay():
    logits, teacher, importance = torch.zeros(1, 2, 70), torch.randn(2, 70), torch.ones(1, 2)
    logits[0, 1, [9, 66]] = 1.0
    kept = logits.clone()
    *_, best, slope = tile_loss(logits, teacher, importance, Objective(), False)
    assert best.tolist() == [[0, 9]] and slope is None and torch.equal(logits, kept)


# --- tree_attention


def check_attention(arguments, **options):
    options = dict(scaling=0.3) | options
    got = tree_attention(*arguments, **options)
    expected = tree_attention_reference(*arguments, **options)
    assert got.dtype == expected.dtype and got.isfinite().all()
    torch.testing.assert_close(got, expected, **CLOSE[got.dtype])
    return got


SIZES = {
    "one query, grouped": dict(lengths=[500], N=1, M=1, D=16, Hkv=2, G=3),
    "thirteen of twenty": dict(lengths=[1, 300], N=13, M=20, D=80, G=3),
    "sixty of seventy, grouped": dict(lengths=[257], N=60, M=70, D=16, G=3),
    "two words": dict(lengths=[31], N=33, M=64, D=16),
    "half": dict(lengths=[300, 7], N=13, M=15, D=80, G=3, dtype=torch.float16),
}


@pytest.mark.parametrize("way", ["plain", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, way):
    arguments = attention_problem(**SIZES[size])
    check_attention(arguments, **options_of(way, arguments[0].shape[1]))


@pytest.mark.parametrize("way", ["plain", "all"])
def test_rows_of_a_larger_cache_in_another_order(way):
    q, k, v, *rest = attention_problem([63, 0, 300], N=5, M=6, D=16, G=2)
    expected = check_attention((q, k, v, *rest), **options_of(way, 2))
    rows, cache = torch.tensor([3, 0, 4]), torch.full((2, 5, *k.shape[1:]), float("nan"))
    cache[0, rows], cache[1, rows] = k, v
    got = check_attention((q, cache[0], cache[1], *rest), rows=rows, **options_of(way, 2))
    assert torch.equal(got, expected)


def splits(monkeypatch, least, most):
    monkeypatch.setattr(attention, "MIN_SPLIT", least)
    monkeypatch.setattr(attention, "MAX_SPLITS", most)


@pytest.mark.parametrize("way", ["plain", "wide window"])
def test_a_row_does_not_depend_on_its_batch_or_the_capacity(way, monkeypatch):
    """Bit for bit, alone and among shorter and longer rows, in a capacity of more or fewer splits;
    one row has as many splits as there may be."""
    splits(monkeypatch, 64, 5)
    arguments = attention_problem([3, 600, 258], N=5, M=6, D=16, G=2, spare=400)
    together = tree_attention_triton(*arguments, **options_of(way, 2))
    for b, length in enumerate([3, 600, 258]):
        for capacity in (length + 6, length + 300):
            alone = tree_attention_triton(*row_alone(arguments, b, capacity), **options_of(way, 2))
            assert torch.equal(alone, together[b : b + 1])


def test_more_splits_than_the_limit(monkeypatch):
    """Small splits and few of them: long rows take larger ones."""
    splits(monkeypatch, 32, 3)
    arguments = attention_problem([290, 65, 31], N=5, M=9, D=16, G=2)
    check_attention(arguments)
    check_attention(arguments, sliding_window=100, sinks=torch.ones(2))


@pytest.mark.parametrize("tree", [33, 100])
def test_a_tree_that_splits_cut(tree, monkeypatch):
    """Where a split begins in the middle of a tree, its blocks' bits begin in the middle of a
    word."""
    splits(monkeypatch, 32, 64)
    for length in (0, 19, 45):
        arguments = attention_problem([length], N=7, M=tree, D=16, seed=length)
        check_attention(arguments)
        check_attention(arguments, sliding_window=9)
