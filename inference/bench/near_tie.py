"""Are two engines' outputs the same, and where not, is the first difference one of rounding?"""

from __future__ import annotations

import torch

from inference.bench.cases import PLAIN, VANILLA
from inference.bench.measure import Run
from kernels.choose import gumbel_noise, process_logits

# how far below the best a token may score to be as good, in units of the dtype's last place there
ULPS = 4
COUNTS = ("rows", "near_ties", "real")


def judge_group(model, prompts: list[list[int]], found: list[Run], options: dict) -> list[dict]:
    """For each run of a group, `identical` and `divergences` (by plain engine) of its JSON; None
    where there is nothing to compare, or where acceptance was forced and the output is not the
    target's. options: top_p, top_k, seed.
    """
    first, exact = found[0].case, model.target.dtype == torch.float32
    options = {**options, "temperature": first.temperature}
    compared = PLAIN if first.temperature == 0.0 else VANILLA
    plain = [run for run in found if run.case.engine in compared]
    verdicts = []
    for run in found:
        verdict: dict = {"identical": None, "divergences": None}
        if plain and run.case.speculative and run.case.forced_acceptance is None:
            counts = {
                other.case.engine: compare(model.target, prompts, run, other, options)
                for other in plain
                if other.case.stock or other.case.capacity == run.case.capacity
            }
            # in half precision compiled and eager passes are two models: between them divergences
            # are counted, and the verdict is of engines that share their passes
            same = {r.case.engine for r in plain if exact or r.case.mode == run.case.mode}
            real = any(count["real"] for name, count in counts.items() if name in same)
            verdict = {"identical": not real, "divergences": counts}
        verdicts.append(verdict)
    return verdicts


def compare(target, prompts: list[list[int]], run: Run, other: Run, options: dict) -> dict:
    """How many rows differ, and how many of them first differ at a near tie, or really do."""
    counts = dict.fromkeys(COUNTS, 0)
    for number, (prompt, a, b) in enumerate(zip(prompts, run.outputs, other.outputs, strict=True)):
        if a == b:
            continue
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        seed = options["seed"] + number % run.case.batch_size
        near = place is not None and near_tie(
            target, prompt + a[:place], a[place], b[place], seed, options
        )
        counts["rows"] += 1
        counts["near_ties" if near else "real"] += 1
    return counts


def near_tie(target, prefix: list[int], ours: int, theirs: int, seed: int, options: dict) -> bool:
    """After `prefix`, are both tokens as good as the best, but for rounding? In float32 no two
    are. Scores are logits, or when sampling processed logits and the position's noise.
    """
    if target.dtype == torch.float32:
        return False
    with target.stock() as model, torch.inference_mode():
        ids = torch.tensor([prefix], device=target.device)
        scores = model(ids).logits[:, -1:].float()
    room = ULPS * torch.finfo(target.dtype).eps * scores.abs().max()
    temperature = options["temperature"]
    if temperature > 0.0:
        room /= temperature
        scores = process_logits(scores, temperature, top_k=options["top_k"], top_p=options["top_p"])
        place = torch.tensor([[len(prefix)]], device=scores.device)
        noise = gumbel_noise(torch.tensor([seed], device=scores.device), place, scores.shape[-1])
        scores = scores + noise
    scores = scores[0, 0]
    return bool(scores.max() - min(scores[ours], scores[theirs]) <= room)


def overall(rows: list[dict]) -> dict[str, dict]:
    """By batch size: are all engines' outputs identical; and divergences in sum and by engine."""
    identical: dict[str, bool] = {}
    divergences: dict[str, dict] = {}
    for row in rows:
        if row["identical"] is None:
            continue
        size = str(row["batch_size"])
        identical[size] = identical.get(size, True) and row["identical"]
        total = divergences.setdefault(size, {**dict.fromkeys(COUNTS, 0), "engines": {}})
        mine = {k: sum(counts[k] for counts in row["divergences"].values()) for k in COUNTS}
        total["engines"][row["engine"]] = mine
        for name, value in mine.items():
            total[name] += value
    return {"identical": identical, "divergences": divergences}
