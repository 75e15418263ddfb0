"""Ratios with their baselines and intervals; and the verdict on two outputs: equal, a near tie that
rounding explains, or really different."""

import functools
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
from kernels.choose import choose


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

    alone = run("eagle", 1.0, tau=2.0)  # nothing to compare with
    assert not any(headline([alone])["speedup"].values())
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


@pytest.fixture(scope="module")
def tied():
    """tied(dtype): a target with two equal rows in its output matrix, 10 and 11, a prefix after
    which they are the likeliest tokens, and the logits there; and a prefix where they are not."""

    def make(dtype):
        model = make_model(make_target("llama").config, seed=1).to(dtype)
        weight = model.get_output_embeddings().weight.data
        weight[11] = weight[10]
        target, prefixes = Target(model, name="tied"), make_prompts((6,) * 2000)

        def after(prompts):
            with target.stock() as stock, torch.no_grad():
                return stock(input_ids=torch.tensor(prompts)).logits[:, -1].float()

        rows, found = after(prefixes), []
        for wanted in (lambda row: row.argmax() == 10, lambda row: row[10] < row.max() - 3):
            likely = (p for p, row in zip(prefixes, rows, strict=True) if wanted(row))
            found.append(next(p for p in likely if wanted(after([p])[0])))
        return target, *found, after(found[:1])[0].argsort(descending=True).tolist()

    return functools.cache(make)


def outcome(target, prompts, ours, theirs, options=GREEDY):
    runs = [Run(Case(name), outputs=rows) for name, rows in (("eagle", ours), ("hf", theirs))]
    return tuple(compare(target, prompts, *runs, options).values())


def test_near_ties_are_judged_by_the_targets_own_logits(tied):
    half, prefix, low, order = tied(torch.bfloat16)
    for pair, tie in (([10, 11], True), ([11, 10], True), ([10, order[-1]], False)):
        assert near_tie(half, prefix, pair, 0, GREEDY) == tie
    assert not near_tie(half, prefix, [order[20], 10], 0, GREEDY)
    assert not near_tie(half, low, [10, 11], 0, GREEDY)  # two equal tokens far behind the best
    # with noise the equal logits are no tie any more
    assert not any(near_tie(half, prefix, [10, 11], seed, SAMPLED) for seed in range(5))
    assert outcome(half, [prefix], [[10, 5]], [[10, 5]]) == (0, 0, 0)
    assert outcome(half, [prefix], [[10, 5]], [[11, 9]]) == (1, 1, 0)
    assert outcome(half, [prefix], [[10, 5]], [[order[-1], 5]]) == (1, 0, 1)
    # a missing tail is no tie, nor is another sample, nor anything in fp32
    assert outcome(half, [prefix], [[10, 5]], [[10]]) == (1, 0, 1)
    assert outcome(half, [prefix], [[10, 5]], [[11, 5]], SAMPLED) == (1, 0, 1)
    exact, prefix, *_ = tied(torch.float32)
    assert outcome(exact, [prefix], [[10]], [[11]]) == (1, 0, 1)


def test_a_sampled_choice_is_a_tie_with_what_is_all_but_as_good(tied):
    """Whatever wins with its noise, and the same token again, is within rounding of the best."""
    half, prefix, _, order = tied(torch.bfloat16)
    with half.stock() as stock, torch.no_grad():
        logits = stock(input_ids=torch.tensor([prefix])).logits[:, -1:].float()
    for seed in range(3):
        at = torch.tensor([[len(prefix)]])
        chosen = choose(logits, torch.tensor([seed]), at, temperature=1.0).item()
        assert near_tie(half, prefix, [chosen, chosen], seed, SAMPLED)
        assert not near_tie(half, prefix, [chosen, order[-1]], seed, SAMPLED)


def test_in_half_precision_the_verdict_is_of_engines_that_share_their_passes(tied):
    """Compiled and eager passes round differently: between them differences are only counted."""
    half, prefix, _, order = tied(torch.bfloat16)
    worst, model = order[-1], SimpleNamespace(target=half)
    names = {"vanilla": 10, "vanilla_compiled": worst, "eagle": 10, "eagle_compiled": worst}
    runs = [Run(Case(name), outputs=[[token]]) for name, token in names.items()]
    *plain, eager, compiled = judge_group(model, [prefix], runs, GREEDY)
    assert [verdict["identical"] for verdict in plain] == [None, None]
    assert eager["identical"] and eager["divergences"]["vanilla_compiled"]["real"] == 1
    assert compiled["identical"] and compiled["divergences"]["vanilla"]["real"] == 1
    runs[2].outputs = [[worst]]
    assert not judge_group(model, [prefix], runs, GREEDY)[2]["identical"]
