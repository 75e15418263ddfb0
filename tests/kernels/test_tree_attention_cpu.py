"""The C++ operator against the reference of tree attention, through the context that feeds it.

b rows in use of B buffer rows, N queries of the longest row, M tree slots, C capacity, D head_dim.
"""

import shutil
from dataclasses import dataclass

import pytest
import torch
from kernel_helpers import WAYS, options_of

from eagle.attention import TreeContext
from eagle.cache import StaticKVCache
from kernels.tree_attention import pack_bits, tree_attention_reference

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"
)
LAYERS, LAYER = 3, 1
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def operator(compile_cache):
    import eagle.compile  # defines eagle::attend
    from kernels.cpu_extension import load

    load(eagle.compile.compiled_folder())


def attend(context, q, k, v, scaling=0.3, sliding_window=None, softcap=None, sinks=None):
    """-> [b, N, Hq, D], zeros where a row has no query."""
    torch.ops.eagle_cpu.enter(context.packed())
    try:
        asked = LAYER, scaling, sliding_window or 0, softcap or 0.0, sinks
        out = torch.ops.eagle.attend(q, k, v, *asked)
    finally:
        torch.ops.eagle_cpu.enter(None)
    assert out.shape == (1, q.shape[2], q.shape[1], q.shape[3])
    assert out.dtype == q.dtype and out.is_contiguous()
    return context.unpack(out)


@dataclass
class Problem:
    """q [1, Hq, T, D], k and v [1, Hkv, T, D] of a pass over `context`; the same padded for the
    reference."""

    context: TreeContext
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    padded_q: torch.Tensor  # [b, Hq, N, D]
    keys: torch.Tensor  # [b, Hkv, C, D] as they must be seen, this pass's included
    values: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    counts: list[int]

    @property
    def cache(self):
        return self.context.cache

    def run(self, **options):
        return attend(self.context, self.q, self.k, self.v, **options)

    def reference(self, scaling=0.3, **options):
        """In fp32, whatever the inputs are."""
        seen = self.padded_q.float(), self.keys.float(), self.values.float()
        tree = self.cache.lengths, pack_bits(self.mask), self.places
        out = tree_attention_reference(*seen, *tree, scaling=scaling, **options)
        for i, n in enumerate(self.counts):
            out[i, n:] = 0
        return out


def problem(
    lengths,
    N=5,
    offset=0,
    Hq=4,
    Hkv=2,
    D=16,
    counts=None,
    order=None,
    rows=None,
    dtype=torch.float32,
    strided=False,
    seed=0,
    scale=1.0,
) -> Problem:
    """Rows of these lengths in buffer rows `order` of `rows`, the tree's slots `offset` before the
    queries filled. What no query may read is NaN: slots past the live ones, and rows and layers not
    in use."""
    g = torch.Generator().manual_seed(seed)
    b, M = len(lengths), N + offset
    counts = counts or [N] * b
    order = order or list(range(b))
    capacity = max(lengths) + M + 3
    cache = StaticKVCache(LAYERS, rows or max(order) + 1, Hkv, capacity, D, dtype, "cpu")
    cache.buffer.fill_(NAN)
    cache = cache.empty_rows(order)
    cache.advance(torch.tensor(lengths), list(lengths))
    keys, values = torch.zeros(2, b, Hkv, capacity, D, dtype=dtype)
    # what the prefix and earlier passes of this tree have written, and what this pass brings along
    new_k, new_v = (torch.randn(b, N, Hkv, D, generator=g).to(dtype) for _ in range(2))
    padded_q = (scale * torch.randn(b, N, Hq, D, generator=g)).to(dtype).transpose(1, 2)
    for i, length in enumerate(lengths):
        for whole, part, new in ((keys, 0, new_k), (values, 1, new_v)):
            old = torch.randn(Hkv, length + offset, D, generator=g).to(dtype)
            cache.buffer[LAYER, part, order[i], :, : length + offset] = old
            whole[i, :, : length + offset] = old
            fresh = slice(length + offset, length + offset + counts[i])
            whole[i, :, fresh] = new[i, : counts[i]].transpose(0, 1)
    mask = torch.rand(b, N, M, generator=g) < 0.4
    mask[:, torch.arange(N), offset + torch.arange(N)] = True  # a query sees itself
    for i, n in enumerate(counts):
        mask[i, :, offset + n :] = False  # and no query that is not there
    depth = torch.randint(0, 7, (b, M), generator=g)
    places = torch.tensor(lengths)[:, None] + depth
    context = TreeContext(cache, places[:, offset:].contiguous(), mask, places, counts)
    q, k, v = (context.pack(x).transpose(1, 2) for x in (padded_q.transpose(1, 2), new_k, new_v))
    if not strided:  # a layer's projections come as views; both must do
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return Problem(context, q, k, v, padded_q, keys, values, mask, places, counts)


def close(problem, **options):
    got, expected = problem.run(**options), problem.reference(**options)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[problem.q.dtype]
    assert got.isfinite().all()
    assert torch.allclose(got.float(), expected, atol=tolerance, rtol=tolerance), (
        (got.float() - expected).abs().max()
    )
    return got


CASES = {
    "one": dict(lengths=[1], N=1, Hq=1, Hkv=1, D=4),
    "nothing before": dict(lengths=[0], N=1),
    "a token each": dict(lengths=[7, 63, 64, 65], N=1),
    "even": dict(lengths=[9, 9]),
    "ragged": dict(lengths=[11, 1, 0, 130]),
    "ungrouped": dict(lengths=[11, 66], Hq=3, Hkv=3),
    "groups of three": dict(lengths=[11, 66], Hq=6, Hkv=2),
    "groups of eight": dict(lengths=[3, 70], Hq=8, Hkv=1, N=7),
    "a whole tree": dict(lengths=[40, 3], N=60),
    "more than a tile": dict(lengths=[40, 3], N=60, Hq=24, Hkv=3),
    "tree slots before": dict(lengths=[5, 17, 64], N=3, offset=11),
    "many before": dict(lengths=[5, 60], N=8, offset=70),
    "counts": dict(lengths=[5, 17, 64], N=6, counts=[6, 1, 3]),
    "a row without a token": dict(lengths=[5, 17, 64], N=6, offset=2, counts=[0, 6, 2]),
    "counts and slots before": dict(lengths=[5, 17, 64], N=6, offset=4, counts=[3, 6, 1]),
    "other order": dict(lengths=[5, 17, 64], order=[4, 0, 2], rows=6),
    "all together": dict(
        dict(lengths=[70, 0, 9, 128], N=9, offset=3, counts=[1, 9, 4, 7]),
        **dict(order=[3, 0, 5, 1], rows=7, Hq=6, D=7),
    ),
    "strided": dict(lengths=[8, 20], N=7, counts=[7, 2], strided=True),
    "long": dict(lengths=[517, 1300, 64], N=17, D=64, Hq=8, counts=[17, 5, 9], order=[2, 0, 1]),
    "narrow heads": dict(lengths=[33, 0, 65], N=5, D=7, Hq=6),
    "wide heads": dict(lengths=[33, 0, 65], N=60, D=80, Hq=16),
    "wider heads": dict(lengths=[33, 0, 65], N=1, D=128),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, way):
    asked = problem(**CASES[case])
    close(asked, **options_of(way, asked.q.shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["ragged", "a whole tree", "more than a tile", "all together"])
def test_half_precision(case, dtype):
    asked = problem(**CASES[case], dtype=dtype)
    close(asked)
    close(asked, sliding_window=6, softcap=2.0, sinks=torch.randn(asked.q.shape[1]).to(dtype))


def test_a_window_does_not_read_what_it_cannot_see():
    """Slots before every query's window may hold anything; whole blocks of them are skipped."""
    asked = problem([300, 20], N=3)
    expected = asked.reference(sliding_window=40)
    asked.cache.buffer[LAYER, :, 0, :, :192] = NAN
    assert torch.allclose(asked.run(sliding_window=40), expected, atol=2e-5)


def test_queries_that_see_nothing_yield_zeros():
    for offset, softcap in ((0, None), (2, None), (0, 2.0)):
        asked = problem([0, 0, 4], N=4, offset=offset)
        asked.mask[0, 1] = asked.mask[1] = False
        for sinks in (None, torch.zeros(4)):
            got = close(asked, softcap=softcap, sinks=sinks)
            assert (got[0, 1] == 0).all() and (got[1] == 0).all() and (got[2] != 0).any()
    # a prefix that the window leaves behind, and a tree that the mask hides
    asked = problem([9, 80], N=2)
    asked.mask[:, 0] = False
    asked.places += 20
    got = close(asked, sliding_window=3)
    assert (got[:, 0] == 0).all() and (got[:, 1] != 0).all()


def test_the_first_blocks_hide_everything():
    """The running maximum starts at nothing, block after block, and then finds something."""
    asked = problem([0], N=5, offset=190)
    asked.mask[:, :, :170] = False
    close(asked)
    asked = problem([200], N=3)
    close(asked, sliding_window=2)


def test_large_scores():
    """The largest score dominates, wherever it comes; nothing overflows."""
    for case in ("ragged", "a whole tree"):
        asked = problem(**CASES[case], scale=1e3)
        got, expected = asked.run(scaling=1.0), asked.reference(scaling=1.0)
        assert torch.allclose(got, expected, atol=1e-3)
        sinks = torch.full((4,), 1e5)
        assert (asked.run(scaling=1.0, sinks=sinks).abs() < 1e-3).all()
        sinks = torch.full((4,), -1e5)
        assert torch.allclose(asked.run(scaling=1.0, sinks=sinks), expected, atol=1e-3)


@pytest.mark.parametrize("case", ["a row without a token", "all together", "other order", "even"])
def test_writes_its_slots_and_nothing_else(case):
    asked = problem(**CASES[case])
    before = asked.cache.buffer.clone()
    asked.run()
    expected = before.clone()
    offset, start = asked.context.offset, 0
    for i, n in enumerate(asked.counts):
        row, slot = asked.cache.order[i], asked.cache.host_lengths[i] + offset
        for part, new in ((0, asked.k), (1, asked.v)):
            expected[LAYER, part, row, :, slot : slot + n] = new[0, :, start : start + n]
        start += n
    assert torch.equal(asked.cache.buffer.nan_to_num(77.0), expected.nan_to_num(77.0))
    assert not torch.equal(asked.cache.buffer.nan_to_num(77.0), before.nan_to_num(77.0))


@pytest.mark.parametrize("case", ["ragged", "all together", "more than a tile", "counts"])
def test_a_row_does_not_depend_on_its_neighbours(case):
    """Bit for bit: what speculative decoding's equality over batches rests on."""
    asked = problem(**CASES[case])
    together = asked.run(sliding_window=50)
    C, (_, Hkv, _, D) = asked.cache.capacity, asked.k.shape
    for i, n in enumerate(asked.counts):
        # the same row alone: everything but the row's own facts is another's
        cache = StaticKVCache(LAYERS, 1, Hkv, C + 5, D, torch.float32, "cpu")
        cache.buffer.fill_(NAN)
        cache.buffer[LAYER, 0, 0, :, :C] = asked.keys[i]
        cache.buffer[LAYER, 1, 0, :, :C] = asked.values[i]
        length, offset = asked.cache.host_lengths[i], asked.context.offset
        cache.advance(torch.tensor([length]), [length])
        places = asked.places[i : i + 1, : offset + n]
        mask = asked.mask[i : i + 1, :n, : offset + n]
        context = TreeContext(cache, places[:, offset:], mask, places)
        start = sum(asked.counts[:i])
        own = (x[:, :, start : start + n] for x in (asked.q, asked.k, asked.v))
        assert torch.equal(attend(context, *own, sliding_window=50)[0], together[i, :n])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("D, Hq", [(64, 2), (7, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_has_the_same_bits_however_it_is_run(dtype, D, Hq, way):
    """Decoded one by one, as a node of a tree, in a prompt and in a chunk of one, at another
    capacity, with neighbours that are not finite."""
    g, Hkv, options = torch.Generator().manual_seed(D), 2, options_of(way, Hq)
    if options.get("sliding_window"):
        options["sliding_window"] = 40
    total, kinds = 72, {}
    q = torch.randn(1, Hq, total, D, generator=g).to(dtype)
    k, v = torch.randn(2, 1, Hkv, total, D, generator=g).to(dtype)

    def run(cache, tokens, mask=None, places=None, junk=None):
        length = cache.host_lengths[0]
        places = torch.arange(length, length + len(tokens)) if places is None else places
        context = TreeContext(
            cache, places[None], None if mask is None else mask[None], places[None]
        )
        given = [x[:, :, tokens].clone() for x in (q, k, v)]
        for x in given:
            x[:, :, [] if junk is None else junk] = NAN
        return attend(context, *given, **options)[0]

    def cache_of(length, capacity=total + 40):
        cache = StaticKVCache(LAYERS, 1, Hkv, capacity, D, dtype, "cpu")
        cache.buffer.fill_(NAN)
        for half, new in enumerate((k, v)):
            cache.buffer[LAYER, half, 0, :, :length] = new[0, :, :length]
        cache.advance(torch.tensor([length]), [length])
        return cache

    plain = torch.cat([run(cache_of(t), [t]) for t in range(total)])
    kinds["capacity"] = (
        range(total),
        torch.cat([run(cache_of(t, t + 1), [t]) for t in range(total)]),
    )
    kinds["prompt"] = range(total), run(cache_of(0), list(range(total)))
    for start in (1, 33, 57):
        some = list(range(start, total))
        mask = torch.ones(len(some), len(some), dtype=torch.bool).tril()
        kinds[f"chunk {start}"] = some, run(cache_of(start), some, mask)
    for start in (0, 1, 59, 60, 61, 63, 64):
        # a path of 7 tokens, spread over a tree whose other nodes are other tokens, and NaN
        path = list(range(start, start + 7))
        at = sorted(torch.randperm(24, generator=g)[:6].add(1).tolist())
        at = [0, *at] if start % 2 else [*at, 25]
        junk = [n for n in range(26) if n not in at]
        tokens, mask = [0] * 26, torch.rand(26, 26, generator=g) < 0.3
        for depth, (node, token) in enumerate(zip(at, path, strict=True)):
            tokens[node], mask[node] = token, False
            mask[node, at[: depth + 1]] = True
        places = start + torch.arange(26) % 7
        places[at] = torch.tensor(path)
        for name, bad in (("tree", None), ("poisoned tree", junk)):
            kinds[f"{name} {start}"] = path, run(cache_of(start), tokens, mask, places, bad)[at]
    for name, (tokens, got) in kinds.items():
        assert torch.equal(got, plain[list(tokens)]), name


def test_more_threads_give_the_same_bits():
    asked = problem(**CASES["more than a tile"])
    one = asked.run()
    torch.set_num_threads(3)
    try:
        assert torch.equal(asked.run(), one)
    finally:
        torch.set_num_threads(1)


def test_what_is_refused():
    asked = problem([3])
    asked.run()
    with pytest.raises(RuntimeError, match="outside of a pass"):  # `enter(None)` forgets the pass
        torch.ops.eagle.attend(asked.q, asked.k, asked.v, LAYER, 1.0, 0, 0.0, None)
    asked.q = asked.q.bfloat16()  # over a buffer of float32
    with pytest.raises(RuntimeError):
        asked.run()
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        problem([3], dtype=torch.float64).run()
