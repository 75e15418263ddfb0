"""A programming problem, whichever data set it comes from, and the program that an answer means.
Rows of a data file through a reader, and those that it refuses."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from eagle.errors import EagleError
from records.sources import read_records, resolve

from .judge import Checker, Suite

FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n?```|\Z)", re.S)


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
    suffix: str | None = None  # what stands after a completion (infilling)
    entry: str = ""  # the function that the tests call (HumanEval)
    asserted: bool = False  # the tests are assertions, run in the program's own process
    checker: Checker | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what judges a program: another test, policy or limit is another problem."""
        return digest(self.tests, self.policy, self.seconds, self.memory_bytes, self.asserted)

    def suite(self) -> Suite:
        """Parsed anew each time: tests can have megabytes."""
        return Suite(**json.loads(self.tests))

    def program(self, completion: str, chat: bool = False) -> str:
        """The program that a completion means: of a chat, or where a fence comes before any stop
        string, the fenced block; else what stands before the first stop string or fence."""
        if self.suffix is not None:
            return self.given + (fenced(completion) if chat else completion) + self.suffix
        text = cut(completion, (*self.stops, "\n```"))
        fence = FENCED.search(completion)
        opens = fence and (fence[1] or completion.count("```") > 1)
        if chat or opens and fence.start() < len(cut(completion, self.stops)):
            text = fenced(completion)
        if self.given and re.search(rf"^def\s+{re.escape(self.entry)}\b", text, re.M):
            # anew, not its rest; it may need what is imported before it
            return self.given.partition(f"def {self.entry}")[0] + text
        return self.given + text


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
        return digest(*((p.task_id, p.fingerprint, p.solutions) for p in self.problems))


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def fenced(text: str) -> str:
    """The first fenced block in Python, else the first one, else the text as it is."""
    blocks = FENCED.findall(text)
    named = [body for language, body in blocks if language.lower() in ("python", "python3", "py")]
    found = named or [body for _, body in blocks]
    return found[0] + "\n" if found else text


def some(names: Sequence[str], most: int = 5) -> str:
    """For messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def read_rows(
    path: str | Path, reader: Callable[[dict, int], object], max_bad_fraction: float
) -> tuple[list, list[dict]]:
    """What `reader(row, place)` makes of rows; {"row", "reason"} where it raises ValueError."""
    rows, bad = [], []
    for file in resolve([path]):
        for record in read_records(file):
            try:
                if record.value is None:
                    raise ValueError(record.error)
                rows.append(reader(record.value, len(rows) + len(bad)))
            except ValueError as error:
                bad.append({"row": f"{record.file}:{record.line}", "reason": reason(error)})
    count = len(rows) + len(bad)
    if not count:
        raise EagleError(f"{path} has no rows; one JSON object a line")
    if len(bad) > max_bad_fraction * count:
        raise EagleError(
            f"{len(bad)} of {count} rows cannot be used, first {bad[0]['row']}: "
            f"{bad[0]['reason']}; repair them, or raise --max_bad_fraction "
            f"(now {max_bad_fraction:g})"
        )
    return rows, bad


def reason(error: ValueError) -> str:
    """In one line; of pydantic's complaints the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
