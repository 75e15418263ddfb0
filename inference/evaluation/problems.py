"""A programming problem, whichever data set it comes from, and the reading of a file of them.

Knows what a problem needs to be asked, answered and judged; knows nothing of models or of running
programs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eagle.errors import EagleError
from inference.evaluation.comparators import POLICIES
from inference.evaluation.judge import Checker, Suite

from .rows import read_rows

FORMATS = ("taco", "humaneval", "mbpp")
FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n?```|\Z)", re.S)


class RowError(ValueError):
    """Why a row is no problem."""


@dataclass(frozen=True)
class Problem:
    """tests: JSON {"inputs", "outputs", "fn_name"?}. question: for a chat; prompt: for a plain
    model. A completion ends before the first of `stops`. solutions: whole programs. policy: how
    outputs are compared, unless a checker does it. seconds and memory_bytes: the problem's own
    limits, None where it names none."""

    task_id: str
    prompt: str
    question: str
    tests: str
    stops: tuple[str, ...] = ()
    solutions: tuple[str, ...] = ()
    policy: str = "strict"
    special_judge: bool = False
    difficulty: str | None = None
    skills: tuple[str, ...] = ()
    seconds: float | None = None
    memory_bytes: int | None = None
    given: str = ""  # what the prompt begins and a completion goes on with (HumanEval)
    entry: str = ""  # the function that the tests call (HumanEval)
    asserted: bool = False  # the tests are assertions, run in the program's own process
    checker: Checker | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what judges a program: another test, policy or limit is another problem."""
        parts = (self.tests, self.policy, self.seconds, self.memory_bytes, self.asserted)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def suite(self) -> Suite:
        """Parsed anew each time: tests can have megabytes."""
        return Suite(**json.loads(self.tests))

    def program(self, completion: str, chat: bool = False) -> str:
        """The program that a completion means: of a chat, or where a fence comes before any stop
        string, the fenced block; else what stands before the first stop string or fence."""
        stop, fence = len(cut(completion, self.stops)), completion.find("```")
        blocks = FENCED.findall(completion)
        opens = bool(blocks) and (bool(blocks[0][0]) or completion.count("```") > 1)
        if chat or opens and fence < stop:
            text = fenced(completion)
        else:
            text = cut(completion, (*self.stops, "\n```"))
        if not self.given:
            return text
        if re.search(
            rf"^def\s+{re.escape(self.entry)}\b", text, re.M
        ):  # the function anew, not its rest
            return f"{self.given}\n{text}" if parses(self.given) else text
        return self.given + text


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def fenced(text: str) -> str:
    """The first fenced block in Python, else the first one, else the text as it is."""
    blocks = FENCED.findall(text)
    named = [body for language, body in blocks if language.lower() in ("python", "python3", "py")]
    found = named or [body for _, body in blocks]
    return found[0] + "\n" if found else text


@dataclass
class ProblemSet:
    """bad: rows that are no problems, {"row", "reason"}. name: of the file, without its folder."""

    problems: list[Problem]
    name: str
    bad: list[dict] = field(default_factory=list)

    @functools.cached_property
    def by_id(self) -> dict[str, Problem]:
        return {problem.task_id: problem for problem in self.problems}

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = [(p.task_id, p.fingerprint, p.solutions) for p in self.problems]
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def load_problems(
    path: str | Path | None,
    *,
    format: str | None = None,
    policy: str = "auto",
    difficulties: Sequence[str] = (),
    skills: Sequence[str] = (),
    limit: int | None = None,
    max_bad_fraction: float = 0.05,
    checkers: str | Path | None = None,
) -> ProblemSet:
    """Problems of a local file; None is the shipped set.

    format: None tells it from each row's own fields. policy: "auto" is each problem's own.
    difficulties, skills: keep the problems that have one of them; limit: the first so many of what
    is left. checkers: a Python file whose CHECKERS is {task id: function(input, expected, got) ->
    bool}; it is run in this process. Rows that are no problems are listed in `bad`; more than
    max_bad_fraction of them, and duplicate ids, raise.
    """
    from . import shipped
    from .humaneval import humaneval_problem, mbpp_problem
    from .taco import taco_problem

    readers = {"taco": taco_problem, "humaneval": humaneval_problem, "mbpp": mbpp_problem}
    if path is None:
        path, checkers = shipped.PROBLEMS, checkers or shipped.CHECKERS
    path = Path(path)
    if policy != "auto" and policy not in POLICIES:
        raise EagleError(f"unknown comparison policy {policy!r}; use auto, {', '.join(POLICIES)}")
    found = ProblemSet([], path.name)
    count = 0
    for count, (where, row) in enumerate(read_rows(path), 1):
        try:
            if isinstance(row, ValueError):
                raise RowError(f"not JSON ({row})")
            if not isinstance(row, dict):
                raise RowError(f"must be an object, not {type(row).__name__}")
            problem = readers[format or recognise(row)](row, count - 1)
        except RowError as error:
            found.bad.append({"row": where, "reason": str(error)})
        else:
            found.problems.append(problem)
    if not count:
        raise EagleError(f"{path} holds no problems; one row a problem")
    if len(found.bad) > max_bad_fraction * count:
        first = found.bad[0]
        raise EagleError(
            f"{len(found.bad)} of {count} rows are no problems, first {first['row']}: {first['reason']}; repair "
            f"them, or raise --max_bad_fraction (now {max_bad_fraction:g})"
        )
    twice = [name for name, n in Counter(p.task_id for p in found.problems).items() if n > 1]
    if twice:
        raise EagleError(f"{path} has several problems of the id {some(twice)}; give each its own")
    if checkers is not None:
        plug_in(found, Path(checkers))
    select(found, difficulties, skills, limit)
    if policy != "auto":
        found.problems = [replace(p, policy=policy, checker=None) for p in found.problems]
    return found


def plug_in(found: ProblemSet, path: Path) -> None:
    """Give problems the checkers that a file has for them."""
    try:
        text = path.read_bytes()
        functions = runpy.run_path(str(path))["CHECKERS"]
        functions = {str(task): function for task, function in functions.items()}
    except Exception as error:  # whatever the file does
        raise EagleError(
            f"no checkers in {path} ({type(error).__name__}: {error}); it must define "
            "CHECKERS = {task id: function(input, expected, got)}"
        ) from error
    if unknown := sorted(functions.keys() - found.by_id.keys()):
        raise EagleError(
            f"{path} has checkers for problems that {found.name} does not have: {some(unknown)}"
        )
    version = hashlib.sha256(text).hexdigest()[:12]  # another file may judge otherwise
    found.problems = [
        replace(p, policy=f"checker {version}", checker=functions[p.task_id])
        if p.task_id in functions
        else p
        for p in found.problems
    ]
    del found.by_id


def select(
    found: ProblemSet, difficulties: Sequence[str], skills: Sequence[str], limit: int | None
) -> None:
    for flag, wanted, known in (
        ("difficulties", difficulties, {p.difficulty for p in found.problems} - {None}),
        ("skills", skills, {skill for p in found.problems for skill in p.skills}),
    ):
        if missing := [name for name in wanted if name not in known]:
            raise EagleError(
                f"no problem has --{flag} {some(missing)}; there are {', '.join(sorted(known)) or 'none'}"
            )
    kept = [
        p
        for p in found.problems
        if (not difficulties or p.difficulty in difficulties)
        and (not skills or set(skills) & set(p.skills))
    ]
    found.problems = kept[:limit]
    if not found.problems:
        raise EagleError("no problem has both that difficulty and that skill; ask for fewer")


def recognise(row: dict) -> str:
    if "input_output" in row:
        return "taco"
    if "entry_point" in row and "test" in row:
        return "humaneval"
    if "test_list" in row:
        return "mbpp"
    raise RowError(
        "has neither input_output (TACO), entry_point and test (HumanEval), nor test_list (MBPP)"
    )


def text_of(row: dict, *names: str, default: str | None = None) -> str:
    """The first of these fields that there is."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise RowError(f"{name} must be text, not {type(value).__name__}")
    if default is None:
        raise RowError(f"has no {' or '.join(names)}")
    return default


def identity(row: dict, place: int) -> str:
    """The row's own id, or its place in the file, counted from 0."""
    for name in ("task_id", "id", "problem_id"):
        value = row.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (str, int)):
                raise RowError(f"{name} must be text or a whole number, not {value!r}")
            return str(value)
    return str(place)


def to_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def some(names: Sequence[str], most: int = 5) -> str:
    """For messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
