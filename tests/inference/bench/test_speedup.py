"""Ratios with their baselines and intervals, on runs written by hand."""

import random

from inference.bench.cases import Case
from inference.bench.measure import Run
from inference.bench.speedup import against_baselines, baseline, headline, interval


class Known:
    """Rows of a run whose tau is known."""

    def __init__(self, cycles):
        self.cycles = cycles


def run(engine, seconds, tau=None, batches=4, **settings):
    """100 tokens in so many seconds."""
    tokens, spent = [100 // batches] * batches, [[seconds / batches]] * batches
    made = Run(Case(engine, **settings), tokens, spent)
    if tau:
        made.rows = [Known((100 - batches) / tau), *(Known(0) for _ in range(batches - 1))]
    return made


def test_headline_of_every_engine():
    result = headline(
        [
            run("hf", 4.0),
            run("hf_prompt_lookup", 0.1),
            run("vanilla", 3.0, tau=1.0),
            run("vanilla_compiled", 2.0, tau=1.0),
            run("eagle", 2.0, tau=3.0),
            run("eagle_compiled", 1.0, tau=4.0),
            run("eagle_auto", 0.8, tau=2.5),
            run("hf", 8.0, batch_size=8),
            run("eagle", 4.0, batch_size=8, tau=2.0),
        ]
    )
    assert result["speedup"] == {
        "vs_hf": {"1": 2.0, "8": 2.0},
        "vs_vanilla": {"1": 1.5},
        "vs_vanilla_compiled": {"1": 2.0},  # of eagle_compiled: the same engine without drafting
        "best_vs_hf": {"1": 5.0, "8": 2.0},
        "best_vs_best_vanilla": {"1": 2.5},  # eagle_auto over vanilla_compiled
    }
    assert result["efficiency"] == {"1": 0.5} and result["efficiency_best"] == {"1": 1.0}


def test_nothing_to_compare_with():
    result = headline([run("eagle", 1.0, tau=2.0)])
    assert not any(result["speedup"].values()) and result["efficiency"] == {}
    assert headline([run("hf", 1.0), run("vanilla", 1.0)])["efficiency_best"] == {}
    alone = run("eagle", 1.0)
    assert set(against_baselines(alone, [alone]).values()) == {None}


def test_the_baseline_has_the_runs_own_settings():
    same = dict(batch_size=2, temperature=0.8, context_length=64)
    mine = run("eagle", 1.0, capacity=128, tree="8,4,2", **same)
    right, stock = run("vanilla", 3.0, capacity=128, **same), run("hf", 3.0, **same)
    others = [
        run("vanilla", 1.0, capacity=256, **same),
        run("vanilla", 1.0, capacity=128),
        run("vanilla", 1.0, capacity=128, **{**same, "batch_size": 1}),
        run("vanilla", 1.0, capacity=128, **{**same, "temperature": 0.0}),
        run("vanilla", 1.0, capacity=128, **{**same, "context_length": 32}),
        run("hf", 1.0),
        run("hf_prompt_lookup", 1.0, **same),
    ]
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
