"""The verdict on two outputs: equal, a near tie shown by replay, or really different."""

import pytest
import torch
from engine_helpers import make_head, make_model, make_prompts, make_target

from eagle.model import EaModel
from eagle.target import Target
from inference import near_tie
from inference.bench.near_tie import Judge, replay

GREEDY = dict(temperature=0.0, top_p=0.0, top_k=0, seed=0)
SAMPLED = {**GREEDY, "temperature": 1.0}
OFF = {"off"}


@pytest.fixture(scope="module")
def half():
    """A bf16 model whose rows 10 and 11 of the output matrix are equal: a perfect tie."""
    model = make_model(make_target("llama").config, seed=1).to(torch.bfloat16)
    weight = model.get_output_embeddings().weight.data
    weight[11] = weight[10]
    return Target(model, name="half")


@pytest.fixture(scope="module")
def half_model(half):
    return EaModel(half, make_head(half).to(torch.bfloat16), "8,4,2")


def logits_after(target, prefix):
    with target.stock() as model, torch.no_grad():
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].float()


def prefix_where(target, condition):
    """A prefix whose next logits fulfil the condition."""
    for seed in range(2000):
        (prefix,) = make_prompts((6,), seed=seed)
        if condition(logits_after(target, prefix)):
            return prefix
    raise AssertionError("no such prefix")


@pytest.fixture(scope="module")
def tied(half):
    """A prefix after which tokens 10 and 11 are the likeliest."""
    return prefix_where(half, lambda logits: logits.argmax() == 10)


def judge(model, options=GREEDY):
    return Judge({"off": model.target}, options, nodes=(8,))


def test_near_ties_are_judged_by_replay(half, half_model, tied):
    order = logits_after(half, tied).argsort(descending=True).tolist()
    low = prefix_where(half, lambda logits: logits[10] < logits.max() - 3)
    with torch.inference_mode():
        is_tie = judge(half_model).near_tie
        assert is_tie(tied, [], 10, 11, 0, OFF) and is_tie(tied, [], 11, 10, 0, OFF)
        assert not is_tie(tied, [], 10, order[-1], 0, OFF)
        assert not is_tie(tied, [], order[20], 10, 0, OFF)
        assert not is_tie(low, [], 10, 11, 0, OFF)  # two equal tokens far behind the best
        assert is_tie(tied[:1], [], 10, order[-1], 0, OFF) in (
            True,
            False,
        )  # one token of context is enough
        # with noise the equal logits are no tie any more
        assert not any(
            judge(half_model, SAMPLED).near_tie(tied, [], 10, 11, s, OFF) for s in range(5)
        )


def test_replay_in_any_chunks_is_the_same_in_fp32(llama):
    prefix = make_prompts((17,))[0]
    whole = replay(llama, prefix, len(prefix), 1, 1)
    for start, chunk, rows in ((3, 1, 1), (5, 4, 2), (1, 16, 3)):
        assert torch.allclose(replay(llama, prefix, start, chunk, rows), whole, atol=1e-4)


def outcome(model, prompts, ours, theirs, options=GREEDY):
    with torch.inference_mode():
        counts = judge(model, options).compare(prompts, ours, theirs, OFF)
    return counts["rows"], counts["near_ties"], counts["real"]


def test_verdicts(half, half_model, tied, llama):
    worst = int(logits_after(half, tied).argmin())
    assert outcome(half_model, [tied], [[10, 5]], [[10, 5]]) == (0, 0, 0)
    assert outcome(half_model, [tied], [[10, 5]], [[11, 9]]) == (1, 1, 0)
    assert outcome(half_model, [tied], [[10, 5]], [[worst, 5]]) == (1, 0, 1)
    # a missing tail is no tie, nor is another sample
    assert outcome(half_model, [tied], [[10, 5]], [[10]]) == (1, 0, 1)
    assert outcome(half_model, [tied], [[10, 5]], [[11, 5]], SAMPLED) == (1, 0, 1)
    # in fp32 nothing is forgiven, not even a perfect tie
    model = make_model(llama.config, seed=1)
    weight = model.get_output_embeddings().weight.data
    weight[11] = weight[10]
    exact = EaModel(Target(model, name="exact"))
    prefix = prefix_where(exact.target, lambda logits: logits.argmax() == 10)
    assert outcome(exact, [prefix], [[10]], [[11]]) == (1, 0, 1)


def test_a_prefix_is_replayed_once_for_all_pairs(half_model, tied, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return replay(*args)

    monkeypatch.setattr(near_tie, "replay", counted)
    with torch.inference_mode():
        one = judge(half_model)
        one.compare([tied], [[10, 5]], [[11, 9]], OFF)
        first = len(calls)
        one.compare([tied], [[11, 5]], [[10, 9]], OFF)
        assert 0 < len(calls) == first
        one.compare([tied], [[10, 5]], [[10, 9]], OFF)
        assert len(calls) > first


def test_compiled_passes_are_replayed_where_one_of_the_two_ran_them(half, half_model, tied):
    """Stands for a compiled target: another model, whose choice after the prefix is another
    token.
    """
    other = Target(make_model(half.config, seed=2).to(torch.bfloat16), name="other")
    theirs = int(logits_after(other, tied).argmax())
    assert theirs not in (10, 11)
    with torch.inference_mode():
        both = Judge({"off": half, "max": other}, GREEDY, nodes=(8,))
        assert not both.near_tie(tied, [], 10, theirs, 0, {"off"})
        assert not both.near_tie(tied, [], 10, theirs, 0, {"max"})
        assert both.near_tie(tied, [], 10, theirs, 0, {"off", "max"})
