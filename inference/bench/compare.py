"""Two runs beside each other: how much faster, and is the output the same; where not, is the first
difference one of rounding?"""

from __future__ import annotations

import numpy as np
import torch

from inference.bench.cases import PLAIN, VANILLA
from inference.bench.measure import Run
from inference.bench.report import bootstrap
from kernels.choose import choose

# how far below the best a token may score to be as good, in units of the dtype's last place there
ULPS = 4
COUNTS = ("rows", "near_ties", "real")


def ratio(run: Run, base: Run) -> float:
    return round(run.tokens_per_second / base.tokens_per_second, 3)


def fastest(runs: list[Run]) -> Run | None:
    return max(runs, key=lambda run: run.tokens_per_second, default=None)


def baseline(run: Run, runs: list[Run], engines: tuple[str, ...]) -> Run | None:
    """The fastest of `engines` under the run's own settings (those that the baseline has)."""

    def settings(of: Run) -> tuple:
        return of.case.batch_size, of.case.context_length, of.case.temperature

    same = [r for r in runs if r.case.engine in engines and settings(r) == settings(run)]
    return fastest([r for r in same if r.case.stock or r.case.capacity == run.case.capacity])


def interval(run: Run, base: Run, seed: int = 0) -> list[float] | None:
    """Bootstrap interval of the ratio; None for one batch. Batches of prompts are drawn, the same
    for both runs: how the ratio moves with the prompts. Repeats enter by their median only."""
    if len(run.batch_tokens) < 2:
        return None
    tokens, seconds = (
        np.array([getattr(r, n) for r in (run, base)]) for n in ("batch_tokens", "medians")
    )

    def of(batches: np.ndarray) -> float:
        rates = tokens[:, batches].sum(1) / seconds[:, batches].sum(1)
        return rates[0] / rates[1]

    return [round(end, 3) for end in bootstrap(of, tokens.shape[1], seed)]


def against_baselines(run: Run, runs: list[Run]) -> dict:
    """What a run's JSON says of its speed."""
    found = {}
    for name, engines in (("vs_hf", ("hf",)), ("vs_best_vanilla", VANILLA)):
        base = baseline(run, runs, engines)
        found[name] = ratio(run, base) if base else None
        found[f"{name}_ci95"] = interval(run, base) if base and base is not run else None
    return found


def headline(runs: list[Run]) -> dict[str, dict]:
    """The JSON's `speedup`, `efficiency` and `efficiency_best`, by batch size (docs/benchmark.md).

    runs: of one combination of settings a batch size."""
    names = ("vs_hf", "vs_vanilla", "vs_vanilla_compiled", "best_vs_hf", "best_vs_best_vanilla")
    speedup: dict[str, dict[str, float]] = {name: {} for name in names}
    found = {"speedup": speedup, "efficiency": {}, "efficiency_best": {}}
    for size in dict.fromkeys(run.case.batch_size for run in runs):
        of = {run.case.engine: run for run in runs if run.case.batch_size == size}
        best = fastest([run for run in of.values() if run.case.speculative])
        plain = fastest([of[engine] for engine in VANILLA if engine in of])
        eager, compiled, stock = of.get("eagle"), of.get("eagle_compiled"), of.get("hf")
        bases = (stock, of.get("vanilla"), of.get("vanilla_compiled"), stock, plain)
        for name, run, base in zip(names, (eager, eager, compiled, best, best), bases, strict=True):
            if run and base:
                speedup[name][str(size)] = ratio(run, base)
        for name, run, base in (("", eager, bases[1]), ("_best", best, plain)):
            if run and base and run.tau:
                found[f"efficiency{name}"][str(size)] = round(ratio(run, base) / run.tau, 3)
    return found


def judge_group(model, prompts: list[list[int]], found: list[Run], options: dict) -> list[dict]:
    """For each run of a group, `identical` and `divergences` (by plain engine) of its JSON; None
    where there is nothing to compare, or where acceptance was forced and the output is not the
    target's. options: top_p, top_k, seed."""
    temperature, exact = found[0].case.temperature, model.target.dtype == torch.float32
    options = {**options, "temperature": temperature}
    compared = PLAIN if temperature == 0.0 else VANILLA
    plain = [run for run in found if run.case.engine in compared]
    verdicts = []
    for run in found:
        verdict: dict = {"identical": None, "divergences": None}
        if plain and run.case.speculative and run.case.forced_acceptance is None:
            others = [r for r in plain if r.case.stock or r.case.capacity == run.case.capacity]
            counts = {
                r.case.engine: compare(model.target, prompts, run, r, options) for r in others
            }
            # in half precision compiled and eager passes are two models: between them divergences
            # are counted, and the verdict is of engines that share their passes
            same = [r.case.engine for r in others if exact or r.case.mode == run.case.mode]
            identical = not any(counts[name]["real"] for name in same)
            verdict = {"identical": identical, "divergences": counts}
        verdicts.append(verdict)
    return verdicts


def compare(target, prompts: list[list[int]], run: Run, other: Run, options: dict) -> dict:
    """How many rows differ, and how many of them first differ at a near tie, or really do."""
    counts = dict.fromkeys(COUNTS, 0)
    for number, (prompt, a, b) in enumerate(zip(prompts, run.outputs, other.outputs, strict=True)):
        if a != b:
            at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len({*pair}) > 1), -1)
            seed = options["seed"] + number % run.case.batch_size
            tie = at >= 0 and near_tie(target, prompt + a[:at], [a[at], b[at]], seed, options)
            counts["rows"] += 1
            counts["near_ties" if tie else "real"] += 1
    return counts


def near_tie(target, prefix: list[int], tokens: list[int], seed: int, options: dict) -> bool:
    """After `prefix`, would the target choose either token if rounding were in its favour? In
    float32 it never is."""
    if target.dtype == torch.float32:
        return False
    device = target.device
    with target.stock() as model, torch.inference_mode():
        logits = model(torch.tensor([prefix], device=device)).logits[:, -1:].float()
    room = ULPS * torch.finfo(target.dtype).eps * logits.abs().max()
    lifted = logits.repeat(len(tokens), 1, 1)  # [a row a token, 1, V]
    lifted[range(len(tokens)), 0, tokens] += room
    seeds = torch.full((len(tokens),), seed, device=device)
    how = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    choices = choose(lifted, seeds, torch.full_like(seeds, len(prefix))[:, None], **how)
    return choices[:, 0].tolist() == tokens


def overall(rows: list[dict]) -> dict[str, dict]:
    """By batch size: are all engines' outputs identical; and divergences in sum and by engine."""
    identical: dict[str, bool] = {}
    divergences: dict[str, dict] = {}
    for row in (row for row in rows if row["identical"] is not None):
        size = str(row["batch_size"])
        identical[size] = identical.get(size, True) and row["identical"]
        total = divergences.setdefault(size, {**dict.fromkeys(COUNTS, 0), "engines": {}})
        mine = {k: sum(counts[k] for counts in row["divergences"].values()) for k in COUNTS}
        total["engines"][row["engine"]] = mine
        for name, value in mine.items():
            total[name] += value
    return {"identical": identical, "divergences": divergences}
