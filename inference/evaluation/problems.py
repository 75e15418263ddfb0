"""Problems of a local file, whichever of the three schemas its rows have."""

from __future__ import annotations

import hashlib
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eagle.errors import EagleError

from . import shipped
from .humaneval import humaneval_problem, mbpp_problem
from .problem import Problem, ProblemSet, some
from .rows import read_rows
from .taco import taco_problem

READERS = {"taco": taco_problem, "humaneval": humaneval_problem, "mbpp": mbpp_problem}


def load_problems(
    path: str | Path | None,
    *,
    format: str = "auto",
    policy: str = "auto",
    difficulties: Sequence[str] = (),
    skills: Sequence[str] = (),
    limit: int | None = None,
    max_bad_fraction: float = 0.05,
    checkers: str | Path | None = None,
) -> ProblemSet:
    """path: None is the shipped set. format: "auto" tells it from each row's own fields. policy:
    "auto" is each problem's own. difficulties, skills: keep the problems that have one of them;
    limit: the first so many of what is left. checkers: a Python file whose CHECKERS is
    {task id: function(input, expected, got) -> bool}; it is run in this process. Rows that are no
    problems are listed in `bad`; more than max_bad_fraction of them, and duplicate ids, raise."""
    if path is None:
        path, checkers = shipped.PROBLEMS, checkers or shipped.CHECKERS

    def read(row: dict, place: int) -> Problem:
        row = {name: value for name, value in row.items() if value is not None}
        return READERS[recognise(row) if format == "auto" else format](row, place)

    problems, bad = read_rows(path, read, max_bad_fraction)
    twice = [name for name, n in Counter(p.task_id for p in problems).items() if n > 1]
    if twice:
        raise EagleError(f"{path} has several problems of the id {some(twice)}; give each its own")
    name = Path(path).name
    if checkers is not None:
        problems = plug_in(problems, name, Path(checkers))
    problems = select(problems, difficulties, skills)[:limit]
    if policy != "auto":
        problems = [replace(p, policy=policy, checker=None) for p in problems]
    return ProblemSet(problems, name, bad)


def recognise(row: dict) -> str:
    if "input_output" in row:
        return "taco"
    if "entry_point" in row and "test" in row:
        return "humaneval"
    if "test_list" in row:
        return "mbpp"
    raise ValueError(
        "has neither input_output (TACO), entry_point and test (HumanEval), nor test_list (MBPP)"
    )


def plug_in(problems: list[Problem], name: str, path: Path) -> list[Problem]:
    """The problems with the checkers that a file has for them."""
    try:
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]  # another may judge otherwise
        found = runpy.run_path(str(path))["CHECKERS"]
        found = {str(task): {"checker": function} for task, function in found.items()}
    except Exception as error:  # whatever the file does
        raise EagleError(
            f"no checkers in {path} ({type(error).__name__}: {error}); it must define "
            "CHECKERS = {task id: function(input, expected, got)}"
        ) from error
    if unknown := sorted(found.keys() - {p.task_id for p in problems}):
        raise EagleError(
            f"{path} has checkers for problems that {name} does not have: {some(unknown)}"
        )
    changes = {task: {**own, "policy": f"checker {version}"} for task, own in found.items()}
    return [replace(p, **changes.get(p.task_id, {})) for p in problems]


def select(
    problems: list[Problem], difficulties: Sequence[str], skills: Sequence[str]
) -> list[Problem]:
    there = {p.difficulty for p in problems} - {None}
    tags = {skill for p in problems for skill in p.skills}
    unknown = [d for d in difficulties if d not in there] + [s for s in skills if s not in tags]
    kept = [
        p
        for p in problems
        if (not difficulties or p.difficulty in difficulties)
        and (not skills or set(skills) & set(p.skills))
    ]
    if unknown or not kept:
        raise EagleError(
            f"no problem has {some(unknown) or 'both that difficulty and that skill'}; there are "
            f"the difficulties {', '.join(sorted(there)) or 'none'} and the skills "
            f"{', '.join(sorted(tags)) or 'none'}"
        )
    return kept
