"""The attention reference against a loop over single queries."""

import pytest
import torch

from kernels.tree_attention import (
    attend,
    attention_bias,
    fold,
    pack_bits,
    tree_attention,
    unpack_bits,
)


def slow(q, k, v, lengths, mask, positions, scaling, window=None, softcap=None, sinks=None):
    """One query and one head at a time, over exactly the keys it may see."""
    B, Hq, N, D = q.shape
    M, groups = mask.shape[2], Hq // k.shape[1]
    out = torch.zeros(B, N, Hq, D)
    for b in range(B):
        length = int(lengths[b])
        for n in range(N):
            here = int(positions[b, M - N + n])
            slots = [(s, s) for s in range(length)]
            slots += [(length + m, int(positions[b, m])) for m in range(M) if mask[b, n, m]]
            slots = [s for s, at in slots if window is None or at > here - window]
            for h in range(Hq):
                if not slots:
                    continue
                keys, values = k[b, h // groups, slots], v[b, h // groups, slots]
                scores = keys @ q[b, h, n] * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                top = scores.exp()
                total = top.sum() + (sinks[h].exp() if sinks is not None else 0)
                out[b, n, h] = (top / total) @ values
    return out


def problem(B, Hq, Hkv, N, M, D, lengths, seed=0, deep=False):
    g = torch.Generator().manual_seed(seed)
    capacity = max(lengths) + M + 3
    q = torch.randn(B, Hq, N, D, generator=g)
    k = torch.randn(B, Hkv, capacity, D, generator=g)
    v = torch.randn(B, Hkv, capacity, D, generator=g)
    lengths = torch.tensor(lengths)
    mask = torch.rand(B, N, M, generator=g) < 0.4
    mask[:, torch.arange(N), M - N + torch.arange(N)] = True  # a query sees itself
    depth = torch.randint(0, 4 + 9 * deep, (B, M), generator=g)
    for b in range(B):
        k[b, :, lengths[b] + M :] = float("nan")
        v[b, :, lengths[b] + M :] = float("nan")
    return q, k, v, lengths, mask, lengths[:, None] + depth


CASES = {
    "one": dict(B=1, Hq=1, Hkv=1, N=1, M=1, D=4, lengths=[0]),
    "odd": dict(B=3, Hq=3, Hkv=3, N=5, M=5, D=7, lengths=[11, 1, 6]),
    "grouped": dict(B=2, Hq=6, Hkv=2, N=7, M=7, D=8, lengths=[13, 4]),
    "one kv head": dict(B=2, Hq=5, Hkv=1, N=3, M=3, D=16, lengths=[3, 9]),
    "more slots than queries": dict(B=2, Hq=4, Hkv=2, N=3, M=11, D=8, lengths=[5, 17]),
    "empty prefix": dict(B=2, Hq=4, Hkv=2, N=4, M=4, D=8, lengths=[0, 9]),
    "even rows": dict(B=2, Hq=4, Hkv=2, N=4, M=4, D=8, lengths=[6, 6]),
}
WAYS = {
    "plain": {},
    "window": dict(sliding_window=4),
    "window of one": dict(sliding_window=1),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "all": dict(sliding_window=5, softcap=2.0, sinks=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case, way):
    q, k, v, lengths, mask, positions = problem(**CASES[case])
    options = dict(WAYS[way])
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, q.shape[1])
    got = tree_attention(q, k, v, lengths, pack_bits(mask), positions, scaling=0.3, **options)
    options["window"] = options.pop("sliding_window", None)
    expected = slow(q, k, v, lengths, mask, positions, 0.3, **options)
    assert got.shape == (q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing_yields_zeros(softcap, sinks):
    q, k, v, lengths, mask, positions = problem(B=2, Hq=4, Hkv=2, N=3, M=3, D=8, lengths=[0, 4])
    mask[0, 1] = False
    sinks = torch.zeros(4) if sinks else None
    out = tree_attention(
        q, k, v, lengths, pack_bits(mask), positions, scaling=0.3, softcap=softcap, sinks=sinks
    )
    assert (out[0, 1] == 0).all() and out.isfinite().all()
    assert torch.allclose(
        out, slow(q, k, v, lengths, mask, positions, 0.3, None, softcap, sinks), atol=1e-5
    )


def test_window_cuts_by_position_and_not_by_slot():
    """Siblings share a position: a window of two sees a parent however many slots lie between."""
    lengths, positions = torch.tensor([5]), torch.tensor([[5, 6, 6, 6, 7]])
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    for n, seen in enumerate([[0], [0, 1], [0, 2], [0, 3], [0, 1, 4]]):
        mask[0, n, seen] = True
    bias = attention_bias(lengths, mask, positions, 10, torch.float32, sliding_window=2)[0, 0]
    seen = [(row == 0).nonzero()[:, 0].tolist() for row in bias]
    assert seen == [[4, 5], [5, 6], [5, 7], [5, 8], [6, 9]]


def test_folded_bias_and_dtype():
    q, k, v, lengths, mask, positions = problem(B=1, Hq=6, Hkv=2, N=4, M=4, D=8, lengths=[5])
    bias = attention_bias(lengths, mask, positions, 9, torch.float32)
    k, v = k[:, :, :9], v[:, :, :9]
    assert torch.equal(attend(q, k, v, bias, 0.3), attend(q, k, v, fold(bias, 4, 3), 0.3))
    for softcap in (None, 2.0):
        half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias.bfloat16(), 0.3, softcap)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), attend(q, k, v, bias, 0.3, softcap), atol=5e-2)


def test_large_scores_stay_finite():
    q, k, v, lengths, mask, positions = problem(B=1, Hq=2, Hkv=2, N=3, M=3, D=8, lengths=[4])
    for options in ({}, {"sinks": torch.full((2,), 1e4)}):
        bits = pack_bits(mask)
        out = tree_attention(q * 1e4, k, v, lengths, bits, positions, scaling=1.0, **options)
        assert out.isfinite().all()


@pytest.mark.parametrize("M", [1, 31, 32, 33, 64, 100])
def test_packed_bits(M):
    mask = torch.rand(2, 3, M, generator=torch.Generator().manual_seed(M)) < 0.5
    mask[0, 0] = True
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, -(-M // 32))
    assert torch.equal(unpack_bits(bits, M), mask)
    for m in range(M):
        word = bits[..., m // 32].long() & 0xFFFFFFFF
        assert torch.equal((word >> (m % 32)) & 1, mask[..., m].long())
    if M % 32:  # nothing beyond the mask
        assert (unpack_bits(bits, 32 * bits.shape[2])[..., M:] == 0).all()
