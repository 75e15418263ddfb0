"""Ratios with their baselines and intervals; and the verdict on two outputs: equal, a near tie that
rounding explains, or really different."""

import random
from types import SimpleNamespace

import pytest
import torch
from engine_helpers import make_model, make_prompts, make_target

from eagle.target import Target
from inference.bench.cases import Case
from inference.bench.compare import (
    against_baselines,
    baseline,
    compare,
    headline,
    interval,
    judge_group,
    near_tie,
)
from inference.bench.measure import Run


def run(engine, seconds, tau=None, batches=4, **settings):
    """100 tokens in so many seconds."""
    tokens, spent = [100 // batches] * batches, [[seconds / batches]] * batches
    made = Run(Case(engine, **settings), tokens, spent)
    if tau:
        cycles = [(100 - batches) / tau, *[0] * (batches - 1)]
        made.rows = [SimpleNamespace(cycles=number) for number in cycles]
    return made


def test_headline_of_every_engine():
    one = [run("hf", 4.0), run("hf_prompt_lookup", 0.1)]
    one += [run("vanilla", 3.0, tau=1.0), run("vanilla_compiled", 2.0, tau=1.0)]
    one += [run("eagle", 2.0, tau=3.0), run("eagle_compiled", 1.0, tau=4.0)]
    one += [run("eagle_auto", 0.8, tau=2.5)]
    eight = [run("hf", 8.0, batch_size=8), run("eagle", 4.0, batch_size=8, tau=2.0)]
    result = headline([*one, *eight])
    assert result["speedup"] == {
        "vs_hf": {"1": 2.0, "8": 2.0},
        "vs_vanilla": {"1": 1.5},
        "vs_vanilla_compiled": {"1": 2.0},  # of eagle_compiled: the same engine without drafting
        "best_vs_hf": {"1": 5.0, "8": 2.0},
        "best_vs_best_vanilla": {"1": 2.5},  # eagle_auto over vanilla_compiled
    }
    assert result["efficiency"] == {"1": 0.5} and result["efficiency_best"] == {"1": 1.0}

    # nothing to compare with
    alone = run("eagle", 1.0, tau=2.0)
    result = headline([alone])
    assert not any(result["speedup"].values()) and result["efficiency"] == {}
    assert headline([run("hf", 1.0), run("vanilla", 1.0)])["efficiency_best"] == {}
    assert set(against_baselines(alone, [alone]).values()) == {None}


def test_the_baseline_has_the_runs_own_settings():
    same = dict(batch_size=2, temperature=0.8, context_length=64)
    mine = run("eagle", 1.0, capacity=128, tree="8,4,2", **same)
    right, stock = run("vanilla", 3.0, capacity=128, **same), run("hf", 3.0, **same)
    others = [run("vanilla", 1.0, capacity=256, **same), run("hf_prompt_lookup", 1.0, **same)]
    for change in ({"batch_size": 1}, {"temperature": 0.0}, {"context_length": 32}):
        others += [run("vanilla", 1.0, capacity=128, **(same | change)), run("hf", 1.0, **change)]
    runs = [*others, right, stock, mine]
    assert baseline(mine, runs, ("vanilla", "vanilla_compiled")) is right
    assert baseline(mine, runs, ("hf",)) is stock
    faster = run("vanilla_compiled", 2.0, capacity=128, **same)
    found = against_baselines(mine, [*runs, faster])
    assert found["vs_hf"] == 3.0 and found["vs_best_vanilla"] == 2.0


def test_interval_is_reproducible_and_pairs_the_batches():
    rng = random.Random(0)
    tokens = [rng.randrange(10, 200) for _ in range(20)]
    slow = Run(Case("hf"), tokens, [[0.01 * n] for n in tokens])
    # twice as fast on every batch: what varies between batches cancels
    fast = Run(Case("eagle"), tokens, [[0.005 * n] for n in tokens])
    assert interval(fast, slow) == [2.0, 2.0]
    assert interval(run("eagle", 1.0, batches=1), run("hf", 3.0, batches=1)) is None
    noisy = Run(Case("eagle"), tokens, [[0.005 * n * rng.uniform(0.7, 1.4)] for n in tokens])
    low, high = interval(noisy, slow)
    assert low < noisy.tokens_per_second / slow.tokens_per_second < high
    assert interval(noisy, slow) == [low, high] != interval(noisy, slow, seed=1)


GREEDY = dict(temperature=0.0, top_p=0.0, top_k=0, seed=0)
SAMPLED = {**GREEDY, "temperature": 1.0}


def tied_target(dtype):
    """Rows 10 and 11 of the output matrix are equal: a perfect tie. And a prefix after which these
    tokens are the likeliest."""
    model = make_model(make_target("llama").config, seed=1).to(dtype)
    weight = model.get_output_embeddings().weight.data
    weight[11] = weight[10]
    target = Target(model, name="tied")
    return target, prefix_where(target, lambda logits: logits.argmax() == 10)


def logits_after(target, prefix):
    with target.stock() as model, torch.no_grad():
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].float()


def prefix_where(target, condition):
    """A prefix whose next logits fulfil the condition, looked for in one batch."""
    prefixes = make_prompts((6,) * 2000)
    with target.stock() as model, torch.no_grad():
        rows = model(input_ids=torch.tensor(prefixes)).logits[:, -1].float()
    likely = (prefix for prefix, row in zip(prefixes, rows, strict=True) if condition(row))
    return next(prefix for prefix in likely if condition(logits_after(target, prefix)))


@pytest.fixture(scope="module")
def half_and_tied():
    return tied_target(torch.bfloat16)


def test_near_ties_are_judged_by_the_targets_own_logits(half_and_tied):
    half, tied = half_and_tied
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


def test_verdicts(half_and_tied):
    half, tied = half_and_tied
    worst = int(logits_after(half, tied).argmin())
    assert outcome(half, [tied], [[10, 5]], [[10, 5]]) == (0, 0, 0)
    assert outcome(half, [tied], [[10, 5]], [[11, 9]]) == (1, 1, 0)
    assert outcome(half, [tied], [[10, 5]], [[worst, 5]]) == (1, 0, 1)
    # a missing tail is no tie, nor is another sample, nor anything in fp32
    assert outcome(half, [tied], [[10, 5]], [[10]]) == (1, 0, 1)
    assert outcome(half, [tied], [[10, 5]], [[11, 5]], SAMPLED) == (1, 0, 1)
    exact, prefix = tied_target(torch.float32)
    assert outcome(exact, [prefix], [[10]], [[11]]) == (1, 0, 1)


def test_in_half_precision_the_verdict_is_of_engines_that_share_their_passes(half_and_tied):
    """Compiled and eager passes round differently: between them differences are only counted."""
    half, tied = half_and_tied
    worst, model = int(logits_after(half, tied).argmin()), SimpleNamespace(target=half)
    names = {"vanilla": 10, "vanilla_compiled": worst, "eagle": 10, "eagle_compiled": worst}
    runs = [Run(Case(name), outputs=[[token]]) for name, token in names.items()]
    *plain, eager, compiled = judge_group(model, [tied], runs, GREEDY)
    assert [verdict["identical"] for verdict in plain] == [None, None]
    assert eager["identical"] and eager["divergences"]["vanilla_compiled"]["real"] == 1
    assert compiled["identical"] and compiled["divergences"]["vanilla"]["real"] == 1
    runs[2].outputs = [[worst]]
    assert not judge_group(model, [tied], runs, GREEDY)[2]["identical"]
