"""From verdicts to a report's numbers: pass@k, its intervals and splits, and comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from eagle.errors import EagleError
from inference.bench.report import bootstrap

from .executing import Verdicts, verified
from .generations import TOO_LONG, Generations
from .judge import ACCEPTED, HARNESS, VERDICTS
from .metrics import repetition, with_references
from .problem import Problem, ProblemSet, some

CAUSES = (*(status for status in VERDICTS if status != HARNESS), TOO_LONG, HARNESS)
LEVELS = ("EASY", "MEDIUM", "MEDIUM_HARD", "HARD", "VERY_HARD")
PLAIN, SPECULATIVE = "vanilla", "eagle"


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n programs, drawn without replacement, hold one of the c right ones
    (Chen et al., 2021): 1 - C(n-c, k) / C(n, k), as a product that does not overflow."""
    assert 1 <= k <= n and 0 <= c <= n, (n, c, k)
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def by_problem(counts: Mapping[str, tuple[int, int]], k: int) -> dict[str, float]:
    """counts: {problem: (n, c)}, n may vary. Fewer than k programs are an EagleError."""
    if short := [f"{task} ({n})" for task, (n, _) in counts.items() if n < k]:
        raise EagleError(
            f"pass@{k} needs at least {k} programs a problem; there are fewer for {some(short)}: "
            "lower --k, or generate and execute what is missing"
        )
    return {task: pass_at_k(n, c, k) for task, (n, c) in counts.items()}


def interval(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """95% percentile-bootstrap interval of the mean over problems: how it would move with others of
    the kind. None where all values are equal: resampling cannot tell then."""
    if len(set(values)) < 2:
        return None
    values = np.asarray(values)
    return [
        round(end, 6) for end in bootstrap(lambda drawn: values[drawn].mean(), len(values), seed)
    ]


def assemble(
    problems: ProblemSet,
    found: Generations,
    verdicts: Verdicts,
    ks: Sequence[int],
    checked: dict | None = None,
    max_harness_errors: float = 0.01,
) -> dict:
    """The whole report of one run. A harness error is nobody's program: it is left out of n. When
    more than max_harness_errors of the programs ended in one, "refused" says so and there are no
    scores. Raises EagleError when a problem has too few programs."""
    kept = verified(problems, checked)
    by_task, causes = found.by_task(), Counter()
    counts: dict[str, tuple[int, int]] = {}
    for problem in kept:
        ended = [verdicts[s.name].status for s in by_task.get(problem.task_id, [])]
        causes.update(ended)
        counts[problem.task_id] = len(ended) - ended.count(HARNESS), ended.count(ACCEPTED)
    programs, failed = sum(causes.values()), causes[HARNESS]
    share = failed / programs if programs else 0.0
    judged = [n for n, _ in counts.values()]
    report = {
        "data": {
            "name": problems.name,
            "fingerprint": problems.fingerprint,
            "problems": len(problems.problems),
            "policies": dict(Counter(p.policy for p in problems.problems)),
            "special_judge": sum(p.special_judge for p in problems.problems),
            "malformed": problems.bad,
            "verified": len(checked["verified"]) if checked else None,
            "excluded": checked["excluded"] if checked else None,
            "unverified": checked["unverified"] if checked else None,
        },
        "generation": found.settings,
        "speed": found.speed(),
        "isolation": sorted({v.isolation for v in verdicts.values() if v.isolation}),
        "scored_problems": len(kept),
        "programs": programs,
        "programs_a_problem": [min(judged), max(judged)],
        "solved_problems": sum(c > 0 for _, c in counts.values()),
        "causes": {name: causes[name] for name in CAUSES if causes[name]},
        "harness_errors": {
            "programs": failed,
            "share": round(share, 5),
            "limit": max_harness_errors,
        },
        **dict.fromkeys(("refused", "pass_at_k", "splits", "detail")),
    }
    if share > max_harness_errors:
        report["refused"] = (
            f"{failed} of {programs} programs ended in a harness error, more than "
            f"{max_harness_errors:.1%}: there is no score; repair what kept them from running and "
            "execute again"
        )
    else:
        detail = {f"pass@{k}": by_problem(counts, k) for k in ks}
        report["detail"] = detail
        report["pass_at_k"] = estimates(kept, detail)
        report["splits"] = {
            part: {name: estimates(group, detail) for name, group in groups.items()}
            for part, groups in splits(kept).items()
        }
    return report


def estimates(group: Sequence[Problem], detail: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Of each pass@k the mean over the problems, and its interval."""
    values = {name: [scores[p.task_id] for p in group] for name, scores in detail.items()}
    return {
        name: {"value": round(float(np.mean(v)), 6), "ci95": interval(v), "problems": len(v)}
        for name, v in values.items()
    }


def splits(problems: Sequence[Problem]) -> dict[str, dict[str, list[Problem]]]:
    """By difficulty, by skill (a problem of several counts in each), and by how the answer is
    judged where that differs."""
    there = {p.difficulty for p in problems} - {None}
    ranked = [level for level in LEVELS if level in there] + sorted(there - set(LEVELS))
    skills = sorted({skill for p in problems for skill in p.skills})
    kinds = {"one right answer": False, "several right answers": True}
    found = {
        "difficulty": {d: [p for p in problems if p.difficulty == d] for d in ranked},
        "skill": {s: [p for p in problems if s in p.skills] for s in skills},
        "judging": {k: [p for p in problems if p.special_judge == v] for k, v in kinds.items()},
    }
    if not all(found["judging"].values()):
        del found["judging"]
    return {name: groups for name, groups in found.items() if groups}


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
