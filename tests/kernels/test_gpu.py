"""The Triton kernels against their references on a GPU, at the sizes of real models."""

import importlib.util

import pytest
import torch
from kernel_helpers import PARAMETERS, attention_problem, commit_problem, row_alone

from kernels.choose import choose, choose_reference, gumbel_noise, process_logits
from kernels.commit_kv import commit_kv, commit_kv_reference
from kernels.dispatch import use_triton
from kernels.tree_attention import pack_bits, tree_attention, tree_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not importlib.util.find_spec("triton"),
        reason="needs a GPU and triton",
    ),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_gpu(lengths, N, M, Hq, Hkv, D, dtype, spare=100):
    return attention_problem(lengths, N, M, D, Hkv, Hq // Hkv, dtype, spare=spare, device="cuda")


def exactly(arguments, **options):
    """The reference in fp32, on the same inputs."""
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    return tree_attention_reference(*wide, **options)


MODELS = {
    "llama 8b": dict(Hq=32, Hkv=8, D=128),
    "qwen 0.5b": dict(Hq=14, Hkv=2, D=64),
    "phi": dict(Hq=32, Hkv=32, D=80),
    "gemma": dict(Hq=8, Hkv=4, D=256),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M", [(1, 1), (13, 20), (60, 60), (60, 100)])
@pytest.mark.parametrize("model", MODELS)
def test_attention(model, N, M, dtype):
    arguments = on_gpu([0, 1, 63, 1500, 5000], N, M, dtype=dtype, **MODELS[model])
    Hq, D = MODELS[model]["Hq"], MODELS[model]["D"]
    assert use_triton(arguments[0])
    sinks = torch.linspace(-1, 2, Hq, device="cuda")
    for options in ({}, dict(sliding_window=700), dict(softcap=30.0), dict(sinks=sinks)):
        options["scaling"] = D**-0.5
        got = tree_attention(*arguments, **options)
        exact = exactly(arguments, **options)
        assert got.isfinite().all() and got.dtype == dtype
        tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(got.float(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_or_the_capacity(dtype):
    lengths = [3, 9000, 258, 1024]
    arguments = on_gpu(lengths, 60, 60, 32, 8, 128, dtype, spare=8000)
    for options in (dict(scaling=0.09), dict(scaling=0.09, sliding_window=2000)):
        together = tree_attention(*arguments, **options)
        for b, length in enumerate(lengths):
            for capacity in (length + 60, length + 3000):
                alone = tree_attention(*row_alone(arguments, b, capacity), **options)
                assert torch.equal(alone, together[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_commit(dtype):
    """Overlapping moves in many rows; repeated, since a race would not show every time."""
    for attempt in range(20):
        rising = attempt % 2 == 1
        buffer, *moves = commit_problem(64, 128, 13, dtype, attempt, rising, device="cuda")
        expected = buffer.clone()
        commit_kv_reference(expected, *moves)
        commit_kv(buffer, *moves)
        assert torch.equal(buffer, expected)


@pytest.mark.slow
def test_addresses_beyond_32_bits():
    """A buffer of more than 2^31 elements, its last row and layer in use."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    buffer = torch.zeros(9, 2, 8, 8, 16384, 128, device="cuda", dtype=torch.bfloat16)
    buffer[8, :, 7, :, 16000:16020] = torch.randn(2, 8, 20, 128, device="cuda").bfloat16()
    lengths = torch.tensor([0] * 7 + [16000], device="cuda")
    path = torch.tensor([[0, 5, 9]] * 8, device="cuda")
    source = buffer[8, :, 7, :, 16009].clone()
    commit_kv(buffer, lengths, path, torch.full((8,), 3, device="cuda"))
    assert torch.equal(buffer[8, :, 7, :, 16002], source)
    q = torch.randn(8, 32, 4, 128, device="cuda").bfloat16()
    bits = pack_bits(torch.ones(8, 4, 4, dtype=torch.bool, device="cuda"))
    positions = lengths[:, None] + torch.arange(4, device="cuda")
    arguments = q, buffer[8, 0], buffer[8, 1], lengths, bits, positions
    one = [x[7:].clone() for x in arguments]
    torch.testing.assert_close(
        tree_attention(*arguments, scaling=0.1)[7:],
        tree_attention_reference(*one, scaling=0.1),
        atol=2e-2,
        rtol=2e-2,
    )


CUTS = {
    "greedy": {},
    "sampled": dict(temperature=0.8),
    "top-k": dict(temperature=1.2, top_k=50),
    "top-p": dict(temperature=0.7, top_p=0.9),
    "both": dict(temperature=0.6, top_k=20, top_p=0.95),
    "all": dict(temperature=1.0, top_k=100, top_p=0.8, min_p=0.02),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("cut", CUTS)
def test_choose(cut, V, dtype):
    g = torch.Generator("cuda").manual_seed(V)
    logits = (torch.randn(4, 30, V, generator=g, device="cuda") * 2.5).to(dtype)
    seeds = torch.randint(0, 2**60, (4,), generator=g, device="cuda")
    positions = torch.randint(0, 5000, (4, 30), generator=g, device="cuda")
    parameters = CUTS[cut]
    got = choose(logits, seeds, positions, **parameters)
    expected = choose_reference(logits, seeds, positions, **parameters)
    differ = (got != expected).nonzero().tolist()
    if not parameters:
        assert not differ
    # logarithms and sums may differ by an ulp: a different choice must have been as good
    for b, n in differ:
        scores = process_logits(logits[b : b + 1, n : n + 1], **parameters)
        noisy = scores + gumbel_noise(seeds[b : b + 1], positions[b : b + 1, n : n + 1], V)
        ours, theirs = noisy[0, 0, got[b, n]], noisy[0, 0, expected[b, n]]
        assert ours.isfinite() and abs(ours - theirs) < 1e-5
    assert len(differ) <= 1


def test_choose_a_row_at_a_time():
    """Rows with parameters of their own choose as they do alone, whatever the split of the
    vocabulary."""
    g = torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(6, 60, 50257, generator=g, device="cuda").bfloat16() * 3
    seeds, positions = torch.arange(6, device="cuda"), torch.arange(360, device="cuda").view(6, 60)
    parameters = {name: column.cuda() for name, column in PARAMETERS.items()}
    together = choose(logits, seeds, positions, **parameters)
    for b in range(6):
        alone = {name: column[b].item() for name, column in parameters.items()}
        for n in (0, 17):
            one = logits[b : b + 1, n : n + 1]
            at = positions[b : b + 1, n : n + 1]
            assert choose(one, seeds[b : b + 1], at, **alone).item() == together[b, n]
    assert torch.equal(together[[0, 4]], logits[[0, 4]].float().argmax(-1))


def test_poisoned_logits_end():
    logits = torch.randn(4, 2, 5000, device="cuda")
    logits[0], logits[1], logits[2, :, 9] = float("nan"), float("-inf"), float("inf")
    seeds, positions = torch.arange(4, device="cuda"), torch.arange(8, device="cuda").view(4, 2)
    for parameters in CUTS.values():
        got = choose(logits, seeds, positions, **parameters)
        assert ((got >= 0) & (got < 5000)).all() and (got[2] == 9).all()


def test_all_three_in_a_cuda_graph():
    """Capture forbids any host synchronisation; replays follow lengths that change on the
    device."""
    arguments = on_gpu([700, 30], 60, 60, 32, 8, 128, torch.bfloat16)
    lengths = arguments[3]
    buffer = torch.randn(2, 2, 2, 8, 900, 128, device="cuda").bfloat16()
    path, counts = torch.tensor([[0, 3, 7]] * 2, device="cuda"), torch.tensor([3, 2], device="cuda")
    logits = torch.randn(2, 60, 32000, device="cuda").bfloat16()
    seeds = torch.arange(2, device="cuda")
    parameters = dict(
        temperature=torch.tensor([0.7, 0.0], device="cuda"),
        top_k=torch.tensor([20, 0], device="cuda"),
        top_p=0.9,
    )

    def step():
        commit_kv(buffer, lengths, path, counts)
        out = tree_attention(*arguments, scaling=0.09, sliding_window=500)
        return out, choose(logits, seeds, arguments[5], **parameters)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, choices = step()
    for shift in (0, -25):
        lengths += shift
        arguments[5].add_(shift)
        expected = buffer.clone()
        commit_kv_reference(expected, lengths, path, counts)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffer, expected)
        exact = exactly(arguments, scaling=0.09, sliding_window=500)
        torch.testing.assert_close(out.float(), exact, atol=3e-2, rtol=3e-2)
        assert torch.equal(choices, choose(logits, seeds, arguments[5], **parameters))
