"""Plain and speculative generation of the same seeds side by side: the same programs and scores,
and how fast each.

Knows finished runs; knows nothing of how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from eagle.errors import EagleError
from inference.bench.report import grid
from inference.generate import write_text

from .generations import Generations
from .problems import ProblemSet, some
from .text_metrics import repetition, with_references

PLAIN, SPECULATIVE = "vanilla", "eagle"


def compare(
    problems: ProblemSet, made: Mapping[str, Generations], reports: Mapping[str, dict]
) -> dict:
    """made, reports: of "vanilla" and "eagle", with equal sampling.

    agree: in float32, that every program is the same; in half precision, where passes of different
    widths round differently, that pass@k is. differ: the programs that are not the same, as
    "task/sample".
    """
    plain = {(s.task_id, s.sample): s.output for s in made[PLAIN].samples}
    ours = {(s.task_id, s.sample): s.output for s in made[SPECULATIVE].samples}
    assert plain.keys() == ours.keys(), "both engines were asked for the same samples"
    differ = [
        f"{task}/{number}" for task, number in plain if plain[task, number] != ours[task, number]
    ]
    scores = {name: report["pass_at_k"] for name, report in reports.items()}
    same_scores = scores[PLAIN] == scores[SPECULATIVE] and scores[PLAIN] is not None
    exact = reports[PLAIN]["generation"]["dtype"] == "float32"
    speed = {name: report["speed"] for name, report in reports.items()}
    ratio = None
    if all(s["samples_per_second"] for s in speed.values()):
        ratio = round(
            speed[SPECULATIVE]["samples_per_second"] / speed[PLAIN]["samples_per_second"], 3
        )
    return {
        "programs": len(plain),
        "differ": differ,
        "differing": len(differ),
        "same_pass_at_k": same_scores,
        "dtype": reports[PLAIN]["generation"]["dtype"],
        "agree": same_scores and (not differ or not exact),
        "pass_at_k": scores,
        "speed": speed,
        "vs_vanilla": ratio,
        "isolation": reports[PLAIN]["isolation"],
        "text": {name: text_facts(problems, found) for name, found in made.items()},
    }


def text_facts(problems: ProblemSet, found: Generations) -> dict:
    """Of each problem's first program, against its first reference solution; None without the
    libraries.
    """
    pairs = []
    for task, samples in found.by_task().items():
        problem = problems.by_id[task]
        if problem.solutions:
            first = samples[0]
            program = problem.program(first.output, bool(first.chat))
            pairs.append((program, problem.solutions[0]))
    facts: dict = {"texts": len(pairs), "repetition": repetition([program for program, _ in pairs])}
    try:
        facts |= with_references(*zip(*pairs, strict=True)) if pairs else {}
    except EagleError as error:
        facts["left_out"] = str(error)
    return facts


def write(folder: Path, result: dict) -> None:
    write_text(folder / "compare.json", json.dumps(result, indent=2) + "\n")
    write_text(folder / "compare.md", markdown(result))


def markdown(result: dict) -> str:
    def show(value, form: str) -> str:
        return "" if value is None else format(value, form)

    names = {PLAIN: "plain", SPECULATIVE: "speculative"}
    lines = [["", *names.values()]]
    for k in result["pass_at_k"][PLAIN] or {}:
        lines.append([k, *(f"{result['pass_at_k'][n][k]['value']:.2%}" for n in names)])
    for label, key, form in (
        ("samples/s", "samples_per_second", ".2f"),
        ("tokens/s", "tokens_per_second", ".1f"),
        ("tau", "tau", ".2f"),
        ("new tokens", "new_tokens", "d"),
    ):
        lines.append([label, *(show(result["speed"][n][key], form) for n in names)])
    for label, key in (("ROUGE-L", "rouge_l"), ("chrF", "chrf"), ("exact match", "exact_match")):
        if key in result["text"][PLAIN]:
            lines.append([label, *(show(result["text"][n][key], ".4f") for n in names)])
    lines.append(
        ["repeated 4-grams", *(show(result["text"][n]["repetition"]["4"], ".1%") for n in names)]
    )
    verdict = (
        "All programs are the same."
        if not result["differ"]
        else f"{result['differing']} of {result['programs']} programs differ: {some(result['differ'])}."
    )
    if result["differ"] and result["dtype"] != "float32":
        verdict += " In half precision passes of different widths round differently; use --dtype float32 for equality."
    scores = "the same" if result["same_pass_at_k"] else "NOT the same"
    return (
        f"# Plain and speculative generation\n\n{grid(lines)}\n\n{verdict} pass@k is {scores}. "
        f"Model in {result['dtype']}; isolation: {', '.join(result['isolation'])}.\n"
    )
