"""Ratios of throughputs, each with its baseline's name and a confidence interval."""

from __future__ import annotations

import numpy as np

from inference.bench.cases import VANILLA, Case
from inference.bench.measure import Run

RESAMPLES = 2000


def fastest(runs: list[Run]) -> Run | None:
    return max(runs, key=lambda run: run.tokens_per_second, default=None)


def baseline(run: Run, runs: list[Run], engines: tuple[str, ...]) -> Run | None:
    """The fastest of `engines` under the run's own settings (those that the baseline has)."""

    def settings(case: Case) -> tuple:
        return case.batch_size, case.context_length, case.temperature

    same = [r for r in runs if r.case.engine in engines and settings(r.case) == settings(run.case)]
    return fastest([r for r in same if r.case.stock or r.case.capacity == run.case.capacity])


def ratio(run: Run, base: Run) -> float:
    return round(run.tokens_per_second / base.tokens_per_second, 3)


def interval(run: Run, base: Run, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """95% percentile-bootstrap interval of the ratio, [low, high].

    Batches of prompts are drawn with replacement, the same for both runs, as both ran on them. It
    says how the ratio moves with the prompts; repeats of a batch enter by their median only. None
    for one batch.
    """
    batches = len(run.batch_tokens)
    if batches < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, batches, (resamples, batches))

    def throughput(r: Run):
        return np.array(r.batch_tokens)[picks].sum(1) / np.array(r.medians)[picks].sum(1)

    ends = np.percentile(throughput(run) / throughput(base), [2.5, 97.5])
    return [round(float(end), 3) for end in ends]


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


def headline(runs: list[Run]) -> dict[str, dict]:
    """The JSON's `speedup`, `efficiency` and `efficiency_best`, by batch size.

    runs: of one combination of settings a batch size.
    speedup: vs_hf and vs_vanilla of engine `eagle`; vs_vanilla_compiled of `eagle_compiled` (the
    same engine without drafting, each); best_vs_hf and best_vs_best_vanilla of the fastest engine
    that drafts. efficiency: vs_vanilla / tau of `eagle`. efficiency_best: best_vs_best_vanilla /
    tau of that engine. At 1 a cycle would cost no more than the plain step that it is measured
    against.
    """
    names = ("vs_hf", "vs_vanilla", "vs_vanilla_compiled", "best_vs_hf", "best_vs_best_vanilla")
    speedup: dict[str, dict[str, float]] = {name: {} for name in names}
    found = {"speedup": speedup, "efficiency": {}, "efficiency_best": {}}
    of_efficiency = {"vs_vanilla": "efficiency", "best_vs_best_vanilla": "efficiency_best"}
    for size in dict.fromkeys(run.case.batch_size for run in runs):
        of = {run.case.engine: run for run in runs if run.case.batch_size == size}
        best = fastest([run for run in of.values() if run.case.speculative])
        plain = fastest([of[engine] for engine in VANILLA if engine in of])
        pairs = {
            "vs_hf": (of.get("eagle"), of.get("hf")),
            "vs_vanilla": (of.get("eagle"), of.get("vanilla")),
            "vs_vanilla_compiled": (of.get("eagle_compiled"), of.get("vanilla_compiled")),
            "best_vs_hf": (best, of.get("hf")),
            "best_vs_best_vanilla": (best, plain),
        }
        for name, (run, base) in pairs.items():
            if run and base:
                speedup[name][str(size)] = ratio(run, base)
                if name in of_efficiency and run.tau:
                    efficiency = round(ratio(run, base) / run.tau, 3)
                    found[of_efficiency[name]][str(size)] = efficiency
    return found
