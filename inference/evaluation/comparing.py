"""Plain and speculative generation of the same seeds side by side: the same programs and scores,
and how fast each."""

from __future__ import annotations

from collections.abc import Mapping

from eagle.errors import EagleError
from inference.bench.report import grid, tabulate

from .generations import Generations
from .problem import ProblemSet
from .text_metrics import repetition, with_references

PLAIN, SPECULATIVE = "vanilla", "eagle"


def compare(
    problems: ProblemSet, made: Mapping[str, Generations], reports: Mapping[str, dict]
) -> dict:
    """made, reports: of "vanilla" and "eagle", with equal sampling.

    agree: in float32, that every program is the same; in half precision, where passes of different
    widths round differently, that pass@k is. differ: the programs that are not the same, as
    "task/sample"."""
    plain, ours = ({s.name: s.output for s in made[e].samples} for e in (PLAIN, SPECULATIVE))
    assert plain.keys() == ours.keys(), "both engines were asked for the same samples"
    differ = [f"{task}/{n}" for task, n in plain if plain[task, n] != ours[task, n]]
    scores = {name: report["pass_at_k"] for name, report in reports.items()}
    same_scores = scores[PLAIN] == scores[SPECULATIVE] and scores[PLAIN] is not None
    dtype = reports[PLAIN]["generation"]["dtype"]
    speed = {name: report["speed"] for name, report in reports.items()}
    rates = [speed[engine]["samples_per_second"] for engine in (SPECULATIVE, PLAIN)]
    return {
        "programs": len(plain),
        "differ": differ,
        "differing": len(differ),
        "same_pass_at_k": same_scores,
        "dtype": dtype,
        "agree": same_scores and (not differ or dtype != "float32"),
        "pass_at_k": scores,
        "speed": speed,
        "vs_vanilla": round(rates[0] / rates[1], 3) if all(rates) else None,
        "isolation": reports[PLAIN]["isolation"],
        "text": {name: text_facts(problems, found) for name, found in made.items()},
    }


def text_facts(problems: ProblemSet, found: Generations) -> dict:
    """Of each problem's first program, against its first reference solution."""
    pairs = []
    for task, (first, *_) in found.by_task().items():
        problem = problems.by_id[task]
        if problem.solutions:
            program = problem.program(first.output, bool(first.chat))
            pairs.append((program, problem.solutions[0]))
    facts: dict = {"texts": len(pairs), "repetition": repetition([program for program, _ in pairs])}
    try:
        facts |= with_references(*zip(*pairs, strict=True)) if pairs else {}
    except EagleError as error:  # without the libraries
        facts["left_out"] = str(error)
    return facts


def markdown(result: dict) -> str:
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
