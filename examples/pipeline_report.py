"""What a pipeline found, from the files that its steps wrote: one JSON object, and a page of
Markdown.
"""

from __future__ import annotations

import json
from pathlib import Path

from inference.bench.report import show

CASES = {
    "bench_base": ("a", "given", "base"),
    "bench_given": ("b", "given", "tuned"),
    "bench_adapted": ("c", "adapted", "tuned"),
}
OF_SFT = (
    "steps",
    "heldout_before",
    "heldout_after",
    "trainable_parameters",
    "total_parameters",
    "adapter_bytes",
    "peak_memory_mb",
)


def summarise(folder: Path, spent: dict[str, dict[str, float]], plan: dict) -> dict:
    """`spent`: seconds and cpu_seconds of each step. rows[]: one for each benchmark; exact{}: in
    fp32, by head.
    """
    sft, head = (_read(folder / name / "summary.json") for name in ("sft", "head"))
    card = _read(folder / "answers" / "answers.card.json")
    found = {name: _read(path) for name in CASES if (path := folder / f"{name}.json").exists()}
    rows = [row_of(name, bench) for name, bench in found.items()]
    exact = {
        name: equality(_read(path))
        for name in ("given", "adapted")
        if (path := folder / f"exact_{name}.json").exists()
    }
    bench = found["bench_adapted"]
    total = {k: sum(took[k] for took in spent.values()) / 60 for k in ("seconds", "cpu_seconds")}
    return {
        "kind": "pipeline",
        **plan,
        "data": {**plan["data"], **{name: sft["data"][name] for name in ("rows", "heldout_rows")}},
        "sft": {name: sft[name] for name in OF_SFT},
        "head": {
            "steps": head["steps"],
            "answers": card["counts"]["answers"],
            "warm_start": plan["given_head"] is not None,
        },
        "rows": rows,
        "exact": exact,
        "identical": all(each["identical"] for each in (*rows, *exact.values())),
        "prompts": bench["num_prompts"],
        "dtype": bench["dtype"],
        "stages": {name: {k: round(v, 1) for k, v in took.items()} for name, took in spent.items()},
        "minutes": round(total["seconds"], 2),
        "cpu_minutes": round(total["cpu_seconds"], 2),
        "environment": bench["environment"],
        "sample": sample(folder / "generations.jsonl"),
    }


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def row_of(name: str, found: dict) -> dict:
    letter, head, target = CASES[name]
    runs = {run["engine"]: run for run in found["runs"]}
    eagle, plain = runs["eagle"], runs["vanilla"]["tokens_per_second"]
    kept = ("tau", "tokens_per_second", "vs_hf", "new_tokens", "looping")
    return {
        "case": letter,
        "head": head,
        "target": target,
        **{name: eagle[name] for name in kept},
        "plain_tokens_per_second": plain,
        "vs_vanilla": eagle["tokens_per_second"] / plain,
        **equality(found),
    }


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


def sample(path: Path) -> dict:
    """The shortest of the generated rows."""
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    record = min(lines, key=lambda r: len(json.dumps(r["prompt"])))
    asked = record["prompt"]
    if "messages" in asked:
        asked = {"prompt": asked["messages"][0]["content"]}
    fields = ("prompt", "instruction", "input", "prefix", "suffix")
    text = "\n\n".join(asked[name] for name in fields if asked.get(name))
    return {"prompt": text, "completion": record["completion"], "tau": record["tau"]}


def markdown(report: dict) -> str:
    data, sft, head, shown = (report[name] for name in ("data", "sft", "head", "sample"))
    before, after = sft["heldout_before"], sft["heldout_after"]
    start = "from the given head" if head["warm_start"] else "from scratch"
    lines = [
        "# Fine-tune, then accelerate",
        "",
        f"Base: {report['base']}; {data['rows']} rows of {', '.join(data['files'])}, "
        f"{data['heldout_rows']} held out; {report['quantization']}.",
        "",
        "| | before SFT | after |",
        "|---|---|---|",
        *(
            f"| held-out {name.replace('_', ' ')} | {before[name]:.3f} | {after[name]:.3f} |"
            for name in ("loss", "token_accuracy")
        ),
        "",
        f"SFT: {sft['steps']} steps, {sft['trainable_parameters']:,} of "
        f"{sft['total_parameters']:,} parameters trained, adapter "
        f"{sft['adapter_bytes'] / 2**20:.1f} MiB, peak memory {sft['peak_memory_mb']:.0f} MB. "
        f"Head: {head['steps']} steps on {head['answers']} answers of the tuned model, {start}.",
        "",
        "| | head | target | τ | tokens/s | plain engine | vs plain | vs stock | looping "
        "| identical (near ties) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        same = f"{'yes' if row['identical'] else 'NO'} ({row['near_ties']} of {row['compared']})"
        lines.append(
            f"| {row['case']} | {row['head']} | {row['target']} | {row['tau']:.2f} | "
            f"{row['tokens_per_second']:.0f} | {row['plain_tokens_per_second']:.0f} | "
            f"{row['vs_vanilla']:.2f} | {show(row['vs_hf'], '.2f')} | {row['looping']:.0%} "
            f"| {same} |"
        )
    stages = ", ".join(f"{name} {took['seconds']:.0f}" for name, took in report["stages"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{report['prompts']} held-out prompts, {report['max_new_tokens']} new tokens at most, "
            f"greedy, batch 1, {report['dtype']}, tree {report['tree']}.",
            "",
            *(
                f"* {name} head in fp32: {found['rows']} of {found['compared']} outputs differ "
                "from the tuned target's own."
                for name, found in report["exact"].items()
            ),
            "",
            f"{report['minutes']:.1f} minutes ({report['cpu_minutes']:.1f} of processor time); "
            f"seconds by stage: {stages}.",
            "",
            f"A held-out prompt:\n\n````\n{shown['prompt']}\n````\n",
            f"The tuned model's answer:\n\n````\n{shown['completion']}\n````\n",
        ]
    )
