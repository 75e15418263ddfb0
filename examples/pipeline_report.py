"""What a pipeline found, as one JSON object and as a page of Markdown.

Knows the files that the stages wrote; runs nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from inference.bench.report import show

if TYPE_CHECKING:
    from examples.pipeline import Plan

CASES = {
    "bench_base": ("a", "given", "base"),
    "bench_given": ("b", "given", "tuned"),
    "bench_adapted": ("c", "adapted", "tuned"),
}
PLAIN = "vanilla"


def summarise(plan: Plan, spent: dict[str, dict[str, float]]) -> dict:
    """`spent`: seconds and cpu_seconds of each stage. rows[]: one for each benchmark; exact{}: in
    fp32, by head.
    """
    sft = read(plan.output / "sft" / "summary.json")
    head = read(plan.output / "head" / "summary.json")
    card = read(plan.answers.with_name("answers.card.json"))
    benches = {
        name: read(path) for name in CASES if (path := plan.output / f"{name}.json").exists()
    }
    exact = {
        name: equality(read(path))
        for name in ("given", "adapted")
        if (path := plan.output / f"exact_{name}.json").exists()
    }
    rows = [row_of(name, found, plan) for name, found in benches.items()]
    surroundings = benches["bench_adapted"]
    return {
        "kind": "pipeline",
        "base": "embedded" if plan.base is None else Path(plan.base).name,
        "given_head": None if plan.head is None else plan.head.name,
        "quantization": plan.quantization,
        "data": {
            "format": plan.data_format,
            "files": [plan.data.name],
            "heldout_files": [plan.heldout.name],
            "rows": sft["data"]["rows"],
            "heldout_rows": sft["data"]["heldout_rows"],
        },
        "sft": {
            name: sft[name]
            for name in (
                "steps",
                "heldout_before",
                "heldout_after",
                "trainable_parameters",
                "total_parameters",
                "adapter_bytes",
                "peak_memory_mb",
            )
        },
        "head": {
            "steps": head["steps"],
            "answers": card["counts"]["answers"],
            "warm_start": plan.head is not None,
        },
        "rows": rows,
        "exact": exact,
        "identical": all(row["identical"] for row in rows)
        and all(e["identical"] for e in exact.values()),
        "prompts": surroundings["num_prompts"],
        "max_new_tokens": plan.max_new_tokens,
        "tree": plan.tree,
        "dtype": surroundings["dtype"],
        "stages": {name: {k: round(v, 1) for k, v in took.items()} for name, took in spent.items()},
        "minutes": round(sum(took["seconds"] for took in spent.values()) / 60, 2),
        "cpu_minutes": round(sum(took["cpu_seconds"] for took in spent.values()) / 60, 2),
        "environment": surroundings["environment"],
        "sample": sample(plan.output / "generations.jsonl"),
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def row_of(name: str, found: dict, plan: Plan) -> dict:
    letter, head, target = CASES[name]
    runs = {run["engine"]: run for run in found["runs"]}
    eagle, plain = runs["eagle"], runs[PLAIN]
    return {
        "case": letter,
        "head": head,
        "target": target,
        "tau": eagle["tau"],
        "tokens_per_second": eagle["tokens_per_second"],
        "plain_tokens_per_second": plain["tokens_per_second"],
        "vs_vanilla": eagle["tokens_per_second"] / plain["tokens_per_second"],
        "vs_hf": eagle["vs_hf"],
        "new_tokens": eagle["new_tokens"],
        "looping": eagle["looping"],
        **equality(found),
    }


def equality(found: dict) -> dict:
    """Is what came with drafting what came without, from our plain engine and from stock
    `generate`?
    """
    counts = [other for run in found["runs"] for other in (run["divergences"] or {}).values()]
    return {
        "identical": all(run["identical"] for run in found["runs"] if run["identical"] is not None),
        "dtype": found["dtype"],
        "compared": len(counts) * found["num_prompts"],
        **{name: sum(c[name] for c in counts) for name in ("rows", "near_ties", "real")},
    }


def sample(path: Path) -> dict:
    """The shortest of the generated rows."""
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    record = min(lines, key=lambda r: len(json.dumps(r["prompt"])))
    asked = record["prompt"]
    if "messages" in asked:
        asked = {"prompt": asked["messages"][0]["content"]}
    parts = [
        asked[name]
        for name in ("prompt", "instruction", "input", "prefix", "suffix")
        if asked.get(name)
    ]
    return {"prompt": "\n\n".join(parts), "completion": record["completion"], "tau": record["tau"]}


def markdown(report: dict) -> str:
    sft, before, after = (
        report["sft"],
        report["sft"]["heldout_before"],
        report["sft"]["heldout_after"],
    )
    head = report["head"]
    lines = [
        "# Fine-tune, then accelerate",
        "",
        f"Base: {report['base']}; {report['data']['rows']} rows of {', '.join(report['data']['files'])}, "
        f"{report['data']['heldout_rows']} held out; {report['quantization']}.",
        "",
        "| | before SFT | after |",
        "|---|---|---|",
        *(
            f"| held-out {name.replace('_', ' ')} | {before[name]:.3f} | {after[name]:.3f} |"
            for name in ("loss", "token_accuracy")
        ),
        "",
        f"SFT: {sft['steps']} steps, {sft['trainable_parameters']:,} of {sft['total_parameters']:,} parameters "
        f"trained, adapter {sft['adapter_bytes'] / 2**20:.1f} MiB, peak memory {sft['peak_memory_mb']:.0f} MB. "
        f"Head: {head['steps']} steps on {head['answers']} answers of the tuned model"
        f"{', from the given head' if head['warm_start'] else ', from scratch'}.",
        "",
        "| | head | target | τ | tokens/s | plain engine | vs plain | vs stock | looping | identical (near ties) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        same = f"{'yes' if row['identical'] else 'NO'} ({row['near_ties']} of {row['compared']})"
        lines.append(
            f"| {row['case']} | {row['head']} | {row['target']} | {row['tau']:.2f} | "
            f"{row['tokens_per_second']:.0f} | {row['plain_tokens_per_second']:.0f} | "
            f"{row['vs_vanilla']:.2f} | {show(row['vs_hf'], '.2f')} | {row['looping']:.0%} | {same} |"
        )
    lines += [
        "",
        f"{report['prompts']} held-out prompts, {report['max_new_tokens']} new tokens at most, greedy, "
        f"batch 1, {report['dtype']}, tree {report['tree']}.",
        "",
    ]
    for name, found in report["exact"].items():
        lines.append(
            f"* {name} head in fp32: {found['rows']} of {found['compared']} outputs differ from the tuned target's own."
        )
    stages = ", ".join(f"{name} {took['seconds']:.0f}" for name, took in report["stages"].items())
    shown = report["sample"]
    lines += [
        "",
        f"{report['minutes']:.1f} minutes ({report['cpu_minutes']:.1f} of processor time); seconds by "
        f"stage: {stages}.",
    ]
    for title, text in (
        ("A held-out prompt:", shown["prompt"]),
        ("The tuned model's answer:", shown["completion"]),
    ):
        lines += ["", title, "", "````", text, "````"]
    lines.append("")
    return "\n".join(lines)
