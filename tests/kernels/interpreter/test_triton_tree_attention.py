"""The attention kernel against its reference: odd sizes, ragged rows, poison behind every row."""

import pytest
import torch

from kernels.tree_attention import pack_bits, tree_attention, tree_attention_reference
from kernels.triton_tree_attention import tree_attention_triton

CLOSE = {torch.float32: dict(atol=2e-5, rtol=1e-4), torch.float16: dict(atol=2e-3, rtol=1e-2)}


def problem(lengths, N, M, D, Hkv=1, G=1, dtype=torch.float32, seed=0, spare=3):
    """Arguments of tree_attention over views of one buffer [L, 2, B, H, C, D], NaN where nothing
    is."""
    g = torch.Generator().manual_seed(seed)
    B = len(lengths)
    q = torch.randn(B, N, Hkv * G, D, generator=g).to(dtype).transpose(1, 2)
    buffer = torch.full((2, 2, B, Hkv, max(lengths) + M + spare, D), float("nan")).to(dtype)
    for b, length in enumerate(lengths):
        live = torch.randn(2, Hkv, length + M, D, generator=g)
        buffer[1, :, b, :, : length + M] = live.to(dtype)
    mask = torch.rand(B, N, M, generator=g) < 0.4
    mask[:, torch.arange(N), M - N + torch.arange(N)] = True  # a query sees itself
    lengths = torch.tensor(lengths)
    depth = torch.randint(0, 9, (B, M), generator=g)
    return q, buffer[1, 0], buffer[1, 1], lengths, pack_bits(mask), lengths[:, None] + depth


def check(arguments, **options):
    options = dict(scaling=0.3) | options
    got = tree_attention_triton(*arguments, **options)
    expected = tree_attention_reference(*arguments, **options)
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.isfinite().all()
    torch.testing.assert_close(got, expected, **CLOSE[got.dtype])
    return got


SIZES = {
    "one query": dict(lengths=[0], N=1, M=1, D=16),
    "one query, grouped": dict(lengths=[500], N=1, M=1, D=16, Hkv=2, G=3),
    "five": dict(lengths=[63, 0], N=5, M=5, D=7, Hkv=2),
    "thirteen of twenty": dict(lengths=[1, 300], N=13, M=20, D=80, G=3),
    "sixty of seventy, grouped": dict(lengths=[257], N=60, M=70, D=16, G=3),
    "two words": dict(lengths=[31], N=33, M=64, D=16),
}
WAYS = {
    "plain": {},
    "window": dict(sliding_window=6),
    "wide window": dict(sliding_window=270),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "all": dict(sliding_window=40, softcap=2.0, sinks=True),
}


def options_of(way, heads):
    options = dict(WAYS[way])
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, heads)
    return options


@pytest.mark.parametrize("size", SIZES)
def test_against_the_reference(size):
    check(problem(**SIZES[size]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", ["five", "thirteen of twenty"])
def test_ways(size, way):
    arguments = problem(**SIZES[size], seed=1)
    check(arguments, **options_of(way, arguments[0].shape[1]))


@pytest.mark.parametrize("way", ["plain", "all"])
def test_half_precision(way):
    arguments = problem([300, 7], N=13, M=15, D=80, G=3, dtype=torch.float16)
    check(arguments, **options_of(way, 3))


@pytest.mark.parametrize("way", ["plain", "all"])
def test_rows_of_a_larger_cache_in_another_order(way):
    q, k, v, *rest = problem([63, 0, 300], N=5, M=6, D=16, G=2)
    options = options_of(way, 2)
    expected = check((q, k, v, *rest), **options)
    rows = torch.tensor([3, 0, 4])
    cache = torch.full((2, 5, *k.shape[1:]), float("nan"))
    cache[0, rows], cache[1, rows] = k, v
    got = check((q, cache[0], cache[1], *rest), rows=rows, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", ["plain", "wide window", "all"])
def test_a_row_does_not_depend_on_its_batch_or_the_capacity(way, monkeypatch):
    """Bit for bit, alone and among shorter and longer rows, in a capacity of more or fewer splits;
    one row has as many splits as there may be."""
    import kernels.triton_tree_attention as module

    monkeypatch.setattr(module, "MIN_SPLIT", 64)
    monkeypatch.setattr(module, "MAX_SPLITS", 5)
    q, k, v, lengths, bits, positions = problem([3, 600, 258], N=5, M=6, D=16, G=2, spare=1500)
    options = options_of(way, 2) | dict(scaling=0.3)
    together = tree_attention_triton(q, k, v, lengths, bits, positions, **options)
    for b, length in enumerate(lengths.tolist()):
        for capacity in (length + 6, length + 300):
            one = slice(b, b + 1)
            alone = tree_attention_triton(
                q[one],
                k[one, :, :capacity],
                v[one, :, :capacity],
                lengths[one],
                bits[one],
                positions[one],
                **options,
            )
            assert torch.equal(alone, together[one])


def test_more_splits_than_the_limit(monkeypatch):
    """Small splits and few of them: long rows take larger ones."""
    import kernels.triton_tree_attention as module

    monkeypatch.setattr(module, "MIN_SPLIT", 32)
    monkeypatch.setattr(module, "MAX_SPLITS", 3)
    arguments = problem([290, 65, 31], N=5, M=9, D=16, G=2)
    check(arguments)
    check(arguments, sliding_window=100, sinks=torch.ones(2))


@pytest.mark.parametrize("tree", [33, 100])
def test_a_tree_that_splits_cut(tree, monkeypatch):
    """Where a split begins in the middle of a tree, its blocks' bits begin in the middle of a
    word."""
    import kernels.triton_tree_attention as module

    monkeypatch.setattr(module, "MIN_SPLIT", 32)
    monkeypatch.setattr(module, "MAX_SPLITS", 64)
    for length in (0, 19, 45):
        check(problem([length], N=7, M=tree, D=16, seed=length))
        check(problem([length], N=7, M=tree, D=16, seed=length), sliding_window=9)


@pytest.mark.parametrize("way", ["plain", "softcap", "sinks"])
def test_a_query_that_sees_nothing_yields_zeros(way):
    q, k, v, lengths, bits, positions = problem([0, 4], N=3, M=3, D=8, G=2)
    bits[0, 1] = 0
    out = check((q, k, v, lengths, bits, positions), **options_of(way, 2))
    assert (out[0, 1] == 0).all() and (out[1, 1] != 0).any()


def test_large_scores_stay_finite():
    q, *rest = problem([40], N=3, M=3, D=8)
    for options in ({}, dict(sinks=torch.full((1,), 1e4)), dict(softcap=30.0)):
        assert tree_attention_triton(q * 1e4, *rest, scaling=1.0, **options).isfinite().all()


def test_the_public_function_dispatches(monkeypatch):
    import kernels.triton_tree_attention as module

    arguments = problem([3], N=2, M=2, D=8)
    ours = tree_attention(*arguments, scaling=0.3)
    assert torch.equal(ours, tree_attention_triton(*arguments, scaling=0.3))
    monkeypatch.setattr(module, "tree_attention_triton", lambda *a, **k: "the kernel")
    assert tree_attention(*arguments, scaling=0.3) == "the kernel"
    monkeypatch.setenv("EAGLE_TRITON", "0")
    assert torch.equal(
        tree_attention(*arguments, scaling=0.3), tree_attention_reference(*arguments, scaling=0.3)
    )
