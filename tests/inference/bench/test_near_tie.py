"""The verdict on two outputs: equal, a near tie that rounding explains, or really different."""

import pytest
import torch
from engine_helpers import make_model, make_prompts, make_target

from eagle.target import Target
from inference.bench.cases import Case
from inference.bench.measure import Run
from inference.bench.near_tie import compare, judge_group, near_tie

GREEDY = dict(temperature=0.0, top_p=0.0, top_k=0, seed=0)
SAMPLED = {**GREEDY, "temperature": 1.0}


def tied_target(dtype):
    """Rows 10 and 11 of the output matrix are equal: a perfect tie."""
    model = make_model(make_target("llama").config, seed=1).to(dtype)
    weight = model.get_output_embeddings().weight.data
    weight[11] = weight[10]
    return Target(model, name="tied")


@pytest.fixture(scope="module")
def half():
    return tied_target(torch.bfloat16)


def logits_after(target, prefix):
    with target.stock() as model, torch.no_grad():
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].float()


def prefix_where(target, condition):
    """A prefix whose next logits fulfil the condition."""
    prefixes = (make_prompts((6,), seed=seed)[0] for seed in range(2000))
    return next(prefix for prefix in prefixes if condition(logits_after(target, prefix)))


@pytest.fixture(scope="module")
def tied(half):
    """A prefix after which tokens 10 and 11 are the likeliest."""
    return prefix_where(half, lambda logits: logits.argmax() == 10)


def test_near_ties_are_judged_by_the_targets_own_logits(half, tied):
    order = logits_after(half, tied).argsort(descending=True).tolist()
    low = prefix_where(half, lambda logits: logits[10] < logits.max() - 3)
    assert near_tie(half, tied, 10, 11, 0, GREEDY) and near_tie(half, tied, 11, 10, 0, GREEDY)
    assert not near_tie(half, tied, 10, order[-1], 0, GREEDY)
    assert not near_tie(half, tied, order[20], 10, 0, GREEDY)
    assert not near_tie(half, low, 10, 11, 0, GREEDY)  # two equal tokens far behind the best
    # with noise the equal logits are no tie any more
    assert not any(near_tie(half, tied, 10, 11, seed, SAMPLED) for seed in range(5))


def outcome(target, prompts, ours, theirs, options=GREEDY):
    runs = [Run(Case(name), outputs=rows) for name, rows in (("eagle", ours), ("hf", theirs))]
    return tuple(compare(target, prompts, *runs, options).values())


def test_verdicts(half, tied):
    worst = int(logits_after(half, tied).argmin())
    assert outcome(half, [tied], [[10, 5]], [[10, 5]]) == (0, 0, 0)
    assert outcome(half, [tied], [[10, 5]], [[11, 9]]) == (1, 1, 0)
    assert outcome(half, [tied], [[10, 5]], [[worst, 5]]) == (1, 0, 1)
    # a missing tail is no tie, nor is another sample
    assert outcome(half, [tied], [[10, 5]], [[10]]) == (1, 0, 1)
    assert outcome(half, [tied], [[10, 5]], [[11, 5]], SAMPLED) == (1, 0, 1)


def test_in_fp32_nothing_is_forgiven():
    exact = tied_target(torch.float32)
    prefix = prefix_where(exact, lambda logits: logits.argmax() == 10)
    assert outcome(exact, [prefix], [[10]], [[11]]) == (1, 0, 1)


def test_in_half_precision_the_verdict_is_of_engines_that_share_their_passes(half, tied):
    """Compiled and eager passes round differently: between them differences are only counted."""
    worst = int(logits_after(half, tied).argmin())
    names = {"vanilla": 10, "vanilla_compiled": worst, "eagle": 10, "eagle_compiled": worst}
    runs = [Run(Case(name), outputs=[[token]]) for name, token in names.items()]
    *plain, eager, compiled = judge_group(type("M", (), {"target": half}), [tied], runs, GREEDY)
    assert [verdict["identical"] for verdict in plain] == [None, None]
    assert eager["identical"] and eager["divergences"]["vanilla_compiled"]["real"] == 1
    assert compiled["identical"] and compiled["divergences"]["vanilla"]["real"] == 1
    runs[2].outputs = [[worst]]
    assert not judge_group(type("M", (), {"target": half}), [tied], runs, GREEDY)[2]["identical"]
