"""Ratios of throughputs, each with its baseline's name and a confidence interval.

Knows runs; knows nothing of how they were made.
"""

from __future__ import annotations

from inference.bench.cases import Case
from inference.bench.measure import Run

RESAMPLES = 2000
VANILLA = ("vanilla", "vanilla_compiled")


def baseline(run: Run, runs: list[Run], engines: tuple[str, ...]) -> Run | None:
    """The fastest of `engines` under the run's own settings (those that the baseline has)."""

    def comparable(other: Case) -> bool:
        mine = run.case
        return (
            other.engine in engines
            and (other.batch_size, other.context_length, other.temperature)
            == (mine.batch_size, mine.context_length, mine.temperature)
            and (other.stock or other.capacity == mine.capacity)
        )

    return max(
        (r for r in runs if comparable(r.case)), key=lambda r: r.tokens_per_second, default=None
    )


def ratio(run: Run, base: Run) -> float:
    return round(run.tokens_per_second / base.tokens_per_second, 3)


def interval(run: Run, base: Run, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """95% percentile-bootstrap interval of the ratio, [low, high].

    Batches of prompts are drawn with replacement, the same for both runs, as both ran on them. It
    says how the ratio moves with the prompts; repeats of a batch enter by their median only. None
    for one batch.
    """
    import numpy as np

    batches = len(run.batch_tokens)
    if batches < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, batches, (resamples, batches))

    def throughput(r: Run):
        return np.array(r.batch_tokens)[picks].sum(1) / np.array(r.medians)[picks].sum(1)

    low, high = np.percentile(throughput(run) / throughput(base), [2.5, 97.5])
    return [round(float(low), 3), round(float(high), 3)]


def against_baselines(run: Run, runs: list[Run]) -> dict:
    """What a run's JSON says of its speed: ratios to stock `generate` and to the fastest plain
    engine of ours.
    """
    found = {}
    for name, engines in (("vs_hf", ("hf",)), ("vs_best_vanilla", VANILLA)):
        base = baseline(run, runs, engines)
        found[name] = ratio(run, base) if base else None
        found[f"{name}_ci95"] = interval(run, base) if base and base is not run else None
    return found


def headline(runs: list[Run]) -> dict:
    """The JSON's `speedup`, `efficiency` and `efficiency_best`, by batch size.

    runs: of one combination of settings a batch size.
    speedup: vs_hf and vs_vanilla of engine `eagle`; vs_vanilla_compiled of `eagle_compiled` (the
      same engine
    without drafting, each); best_vs_hf and best_vs_best_vanilla of the fastest engine that drafts.
    efficiency: vs_vanilla / tau of `eagle`. efficiency_best: best_vs_best_vanilla / tau of that
      engine. At 1
    a cycle would cost no more than the plain step that it is measured against.
    """
    speedup: dict[str, dict[str, float]] = {
        name: {}
        for name in (
            "vs_hf",
            "vs_vanilla",
            "vs_vanilla_compiled",
            "best_vs_hf",
            "best_vs_best_vanilla",
        )
    }
    efficiency: dict[str, float] = {}
    efficiency_best: dict[str, float] = {}
    for size in dict.fromkeys(run.case.batch_size for run in runs):
        key = str(size)
        of = {run.case.engine: run for run in runs if run.case.batch_size == size}
        drafting = [run for run in of.values() if run.case.speculative]
        plain = [of[engine] for engine in VANILLA if engine in of]
        best = max(drafting, key=lambda r: r.tokens_per_second, default=None)
        best_plain = max(plain, key=lambda r: r.tokens_per_second, default=None)
        for name, run, base in (
            ("vs_hf", of.get("eagle"), of.get("hf")),
            ("vs_vanilla", of.get("eagle"), of.get("vanilla")),
            ("vs_vanilla_compiled", of.get("eagle_compiled"), of.get("vanilla_compiled")),
            ("best_vs_hf", best, of.get("hf")),
            ("best_vs_best_vanilla", best, best_plain),
        ):
            if run and base:
                speedup[name][key] = ratio(run, base)
        if key in speedup["vs_vanilla"] and of["eagle"].tau:
            efficiency[key] = round(speedup["vs_vanilla"][key] / of["eagle"].tau, 3)
        if key in speedup["best_vs_best_vanilla"] and best.tau:
            efficiency_best[key] = round(speedup["best_vs_best_vanilla"][key] / best.tau, 3)
    return {"speedup": speedup, "efficiency": efficiency, "efficiency_best": efficiency_best}
