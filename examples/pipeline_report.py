"""What a pipeline found, from the files that its steps wrote: one JSON object, and a page."""

from __future__ import annotations

import json
from pathlib import Path

from inference.bench.report import grid, tabulate

# benchmark -> case, head, target
CASES = {
    "bench_base": ("a", "given", "base"),
    "bench_given": ("b", "given", "tuned"),
    "bench_adapted": ("c", "adapted", "tuned"),
}


def summarise(folder: Path, spent: dict[str, dict[str, float]], plan: dict) -> dict:
    """`spent`: seconds and cpu_seconds of each step. rows[]: one for each benchmark; exact{}: in
    fp32, by head.
    """

    def read(name: str) -> dict | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    sft, head = read("sft/summary"), read("head/summary")
    found = {name: read(name) for name in CASES}
    rows = [row_of(name, bench) for name, bench in found.items() if bench]
    exact = {name: read(f"exact_{name}") for name in ("given", "adapted")}
    exact = {name: equality(bench) for name, bench in exact.items() if bench}
    last = (folder / "generations.jsonl").read_text("utf-8").split("\n")[0]
    return {
        "kind": "pipeline",
        **plan,
        "sft": sft,
        "head": {**head, "answers": read("answers/answers.card")["counts"]["answers"]},
        "rows": rows,
        "exact": exact,
        "identical": all(each["identical"] for each in (*rows, *exact.values())),
        "dtype": found["bench_adapted"]["dtype"],
        "environment": found["bench_adapted"]["environment"],
        "stages": {name: {k: round(v, 1) for k, v in took.items()} for name, took in spent.items()},
        "minutes": round(sum(took["seconds"] for took in spent.values()) / 60, 2),
        "sample": json.loads(last),
    }


def row_of(name: str, found: dict) -> dict:
    runs = {run["engine"]: run for run in found["runs"]}
    eagle, plain = runs["eagle"], runs["vanilla"]["tokens_per_second"]
    kept = ("tau", "tokens_per_second", "vs_hf", "new_tokens", "looping")
    speed = {"plain": plain, "vs_vanilla": eagle["tokens_per_second"] / plain}
    case = dict(zip(("case", "head", "target"), CASES[name], strict=True))
    return {**case, **{name: eagle[name] for name in kept}, **speed, **equality(found)}


def equality(found: dict) -> dict:
    """Is what came with drafting what came without, from our plain engine and from stock
    `generate`?
    """
    counts = [other for run in found["runs"] for other in (run["divergences"] or {}).values()]
    return {
        "identical": all(run["identical"] in (True, None) for run in found["runs"]),
        "dtype": found["dtype"],
        "compared": len(counts) * found["num_prompts"],
        **{name: sum(c[name] for c in counts) for name in ("rows", "near_ties", "real")},
    }


def markdown(report: dict) -> str:
    sft, rows = report["sft"], report["rows"]
    before, after = sft["heldout_before"], sft["heldout_after"]
    tuning = [["held-out", "before SFT", "after"]]
    for name in ("loss", "token_accuracy"):
        tuning.append([name, f"{before[name]:.3f}", f"{after[name]:.3f}"])
    columns = {name: name for name in ("case", "head", "target")}
    columns |= {"τ": "tau:.2f", "tokens/s": "tokens_per_second:.0f", "plain": "plain:.0f"}
    columns |= {"vs plain": "vs_vanilla:.2f", "vs stock": "vs_hf:.2f", "looping": "looping:.0%"}
    columns |= {"identical": "identical", "near ties": "near_ties", "of": "compared"}
    parts = [
        "# Fine-tune, then accelerate",
        f"Base {report['base']}, {report['quantization']}: {sft['steps']} steps of SFT on "
        f"{sft['data']['rows']} rows, then {report['head']['steps']} steps of the head "
        f"({report['given_head'] or 'from scratch'}) on {report['head']['answers']} answers of the "
        "tuned model.",
        grid(tuning),
        grid(tabulate(rows, **columns)),
        f"{report['num_prompts']} held-out prompts, {report['max_new_tokens']} new tokens at most, "
        f"greedy, batch 1, {report['dtype']}, tree {report['tree']}; {report['minutes']} minutes.",
        *(
            f"{name} head in fp32: {found['rows']} of {found['compared']} outputs differ from the "
            "tuned target's own."
            for name, found in report["exact"].items()
        ),
        f"An answer of the tuned model:\n\n````\n{report['sample']['completion']}\n````",
    ]
    return "\n\n".join(parts) + "\n"
