"""A report's files: JSON, a Markdown page, and upstream's metrics file."""

from __future__ import annotations

import json
from pathlib import Path

from eagle.files import atomic_write_text
from inference.bench.report import grid, show, tabulate

from .scores import PLAIN, SPECULATIVE


def write(folder: Path, report: dict, suffix: str = "") -> None:
    """report{suffix}.json and .md, and upstream's metrics{suffix}.json: {"pass@k": score, …,
    "detail": {"pass@k": {id: score}}}."""
    shown = {k: v for k, v in report.items() if k != "detail"}
    atomic_write_text(folder / f"report{suffix}.json", json.dumps(shown, indent=2) + "\n")
    atomic_write_text(folder / f"report{suffix}.md", markdown(report))
    if report["pass_at_k"]:
        metrics = {name: found["value"] for name, found in report["pass_at_k"].items()}
        metrics["detail"] = report["detail"]
        atomic_write_text(folder / f"metrics{suffix}.json", json.dumps(metrics, indent=1) + "\n")


def markdown(report: dict) -> str:
    parts = ["# Evaluation", grid([["what", "value"], *facts(report).items()])]
    if report["refused"]:
        parts += ["## No score", report["refused"]]
    else:
        note = (
            "In brackets: 95% bootstrap interval over problems, where they differ. A problem may "
            "have several skills."
        )
        parts += ["## pass@k", grid(score_lines(report)), note]
    total = report["programs"] or 1
    causes = [[name, str(n), f"{n / total:.1%}"] for name, n in report["causes"].items()]
    parts += ["## Outcomes", grid([["outcome", "programs", "share"], *causes])]
    out = [[row["task_id"], row["reason"]] for row in report["data"]["excluded"] or []]
    out += [[row["row"], row["reason"]] for row in report["data"]["malformed"]]
    if out:
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in out]
        parts += ["## Excluded", grid([["problem", "why"], *cells])]
    return "\n\n".join(parts) + "\n"


def facts(report: dict) -> dict[str, str]:
    data, speed, settings = report["data"], report["speed"], report["generation"]
    low, high = report["programs_a_problem"]
    scored = f"{report['scored_problems']} of {data['problems']} problems scored"
    lines = {
        "data": f"{data['name']}: {scored}",
        "passing with their own solution": show(data["verified"], "d") or "not run",
        "without one, their tests taken as right": str(len(data["unverified"] or [])),
        "programs": f"{report['programs']}, {low if low == high else f'{low} to {high}'} a problem",
        "isolation": ", ".join(report["isolation"]) or "nothing was run",
        "comparison": ", ".join(f"{name}: {n}" for name, n in data["policies"].items()),
    }
    if settings:
        for line, names in (
            ("model", ("model", "dtype", "engine", "tree")),
            ("sampling", ("temperature", "top_p", "top_k", "seed", "max_new_tokens")),
        ):
            lines[line] = ", ".join(f"{name} {settings[name]}" for name in names)
    if speed["tokens_per_second"]:
        lines["generation"] = (
            f"{speed['samples_per_second']:.2f} samples/s, {speed['tokens_per_second']:.0f} "
            f"tokens/s, tau {show(speed['tau'], '.2f')}"
        )
    return lines


def score_lines(report: dict) -> list[list[str]]:
    names = list(report["pass_at_k"])
    rows = {"all": report["pass_at_k"]}
    for groups in report["splits"].values():
        rows |= groups
    lines = [["problems", "number", *names]]
    for name, entry in rows.items():
        lines.append([name, str(entry[names[0]]["problems"]), *(percent(entry[k]) for k in names)])
    return lines


def percent(entry: dict) -> str:
    text = f"{entry['value']:.2%}"
    return text + (" [{:.2%}, {:.2%}]".format(*entry["ci95"]) if entry["ci95"] else "")


def side_by_side(result: dict) -> str:
    """The page of a comparison."""
    rows = []
    for engine, name in ((PLAIN, "plain"), (SPECULATIVE, "speculative")):
        values = {k: found["value"] for k, found in (result["pass_at_k"][engine] or {}).items()}
        rows.append({"engine": name, **values, **result["speed"][engine], **result["text"][engine]})
    columns = {
        "engine": "engine",
        **{k: f"{k}:.2%" for k in result["pass_at_k"][PLAIN] or {}},
        "samples/s": "samples_per_second:.2f",
        "tokens/s": "tokens_per_second:.1f",
        "tau": "tau:.2f",
        "new tokens": "new_tokens:d",
        "ROUGE-L": "rouge_l:.4f",
        "chrF": "chrf:.4f",
        "exact match": "exact_match:.4f",
    }
    same = f"{result['differing']} of {result['programs']} programs differ"
    scores = "the same" if result["same_pass_at_k"] else "NOT the same"
    return f"{grid(tabulate(rows, **columns))}\n\n{same}; pass@k is {scores}.\n"
