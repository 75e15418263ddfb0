"""Tree attention against a loop over single queries: the reference, and in the interpreter's
process the kernel."""

import pytest
import torch
from kernel_helpers import WAYS, attention_problem, options_of

from kernels.tree_attention import (
    attend,
    attention_bias,
    fold,
    pack_bits,
    tree_attention,
    unpack_bits,
)


def slow(q, k, v, lengths, bits, positions, scaling, sliding_window=None, softcap=None, sinks=None):
    """One query and one head at a time, over exactly the keys it may see."""
    B, Hq, N, D = q.shape
    M, groups = positions.shape[1], Hq // k.shape[1]
    mask, out = unpack_bits(bits, M), torch.zeros(B, N, Hq, D)
    for b in range(B):
        length = int(lengths[b])
        for n in range(N):
            here = int(positions[b, M - N + n])
            slots = [(s, s) for s in range(length)]
            slots += [(length + m, int(positions[b, m])) for m in range(M) if mask[b, n, m]]
            window = sliding_window or 10**9
            slots = [s for s, at in slots if at > here - window]
            for h in range(Hq if slots else 0):
                keys, values = k[b, h // groups, slots], v[b, h // groups, slots]
                scores = keys @ q[b, h, n] * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                top = scores.exp()
                total = top.sum() + (sinks[h].exp() if sinks is not None else 0)
                out[b, n, h] = (top / total) @ values
    return out


def check(arguments, **options):
    got = tree_attention(*arguments, **options)
    expected = slow(*arguments, **options)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=2e-5, rtol=1e-4)
    return got


CASES = {
    "one": dict(N=1, M=1, D=4, lengths=[0]),
    "odd": dict(Hkv=3, N=5, M=5, D=7, lengths=[11, 1, 6]),
    "grouped": dict(Hkv=2, G=3, N=7, M=7, D=8, lengths=[13, 4]),
    "more slots than queries": dict(Hkv=1, G=5, N=3, M=11, D=16, lengths=[5, 17]),
    "empty prefix": dict(Hkv=2, G=2, N=4, M=4, D=8, lengths=[0, 9]),
    "even rows": dict(Hkv=2, G=2, N=4, M=4, D=8, lengths=[6, 6]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case, way):
    arguments = attention_problem(**CASES[case])
    check(arguments, **options_of(way, arguments[0].shape[1]))


@pytest.mark.parametrize("way", ["plain", "softcap", "sinks", "all"])
def test_a_query_that_sees_nothing_yields_zeros(way):
    q, k, v, lengths, bits, positions = attention_problem([0, 4], N=3, M=3, D=8, Hkv=2, G=2)
    bits[0, 1] = 0
    out = check((q, k, v, lengths, bits, positions), **options_of(way, 4))
    assert (out[0, 1] == 0).all() and (out[1, 1] != 0).any()


def test_large_scores_stay_finite():
    q, *rest = attention_problem([40], N=3, M=3, D=8)
    for options in ({}, dict(sinks=torch.full((1,), 1e4)), dict(softcap=30.0)):
        assert tree_attention(q * 1e4, *rest, scaling=1.0, **options).isfinite().all()


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
    q, k, v, lengths, bits, positions = attention_problem([5], N=4, M=4, D=8, Hkv=2, G=3, spare=0)
    bias = attention_bias(lengths, unpack_bits(bits, 4), positions, 9, torch.float32)
    assert torch.equal(attend(q, k, v, bias, 0.3), attend(q, k, v, fold(bias, 4, 3), 0.3))
    for softcap in (None, 2.0):
        half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias.bfloat16(), 0.3, softcap)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), attend(q, k, v, bias, 0.3, softcap), atol=5e-2)


@pytest.mark.parametrize("M", [1, 31, 32, 33, 64, 100])
def test_packed_bits(M):
    mask = torch.rand(2, 3, M, generator=torch.Generator().manual_seed(M)) < 0.5
    mask[0, 0] = True
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, -(-M // 32))
    for m in range(M):
        word = bits[..., m // 32].long() & 0xFFFFFFFF
        assert torch.equal((word >> (m % 32)) & 1, mask[..., m].long())
    unpacked = unpack_bits(bits, 32 * bits.shape[2])
    assert torch.equal(unpacked[..., :M], mask) and not unpacked[..., M:].any()
