"""Problems of a data file, whichever of four schemas its rows have: TACO's (Li et al., 2023), with
JSON and Python literals inside strings, and limits as prose; HumanEval's and MBPP's, whose tests
are assertions (Chen et al., 2021; Austin et al., 2021); HumanEval's with a `suffix`, to be filled
in before it (Bavarian et al., 2022).

Assertions run in the program's own process, after it and out of its reading: a program that fails
by mistake cannot pass, one written to deceive could. TACO's tests do not have that limit.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import runpy
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from eagle.errors import EagleError

from .comparators import POLICIES
from .judge import Suite
from .problem import Problem, ProblemSet, read_rows, some

SHIPPED = Path(__file__).with_name("shipped")  # a small set of our own, in TACO's schema
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif __name__", "\nprint(", "\nassert ")
MBPP_STOPS = ('\n"""', "\nassert ", "\nclass Test", "\nif __name__", "\nprint(")
STOPS = ("\nQUESTION", "\n---", "\nANSWER")
FENCED = "one fenced block"
HOLE = "# TO BE FILLED IN"
HARNESS = """import io, sys
tests, word = sys.stdin.read().rsplit("\\n", 1)
out, sys.stdout = sys.stdout, io.StringIO()
space = {{"__name__": "__main__"}}
exec(compile({program!r}, "program.py", "exec"), space)
try:
    exec(compile(tests, "tests.py", "exec"), space)
except AssertionError:
    word = "an assertion failed"
print(word, file=out)
"""
# the data does not say which problems have several right answers; their statements do
SEVERAL = re.compile(
    r"if there (?:are|is|exists?) (?:multiple|several|many|more than one)"
    r"|\bany (?:of them|one of|valid|correct)|\b(?:print|output|return|find) any\b|\bany order\b",
    re.I,
)
ANY_CASE = re.compile(
    r"\b(?:any|either) (?:letter )?case\b|upper or lower|case[- ]insensitive", re.I
)
DECIMAL = re.compile(r"(?<!\S)[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?!\S)")


def from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def from_literal(value: Any) -> Any:
    """Tags: a Python list in a string, or a list."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) and value.strip() else value or []
    except SyntaxError as error:
        raise ValueError(f"no Python literal ({value[:40]!r})") from error


class Judge(BaseModel):
    """Ours: TACO does not say how to compare."""

    policy: Literal[tuple(POLICIES)] | None = None
    special: bool | None = None


class Row(BaseModel):
    task_id: str | int | None = Field(
        None, validation_alias=AliasChoices("task_id", "id", "problem_id")
    )


class Taco(Row):
    question: str = Field(validation_alias=AliasChoices("question", "description"))
    starter_code: str = ""
    input_output: Annotated[Suite, BeforeValidator(from_json)]
    solutions: Annotated[list[str], BeforeValidator(from_json)] = []
    judge: Annotated[Judge, BeforeValidator(from_json)] = Judge()
    difficulty: str = ""
    skill_types: Annotated[list[str], BeforeValidator(from_literal)] = []
    time_limit: Any = None
    memory_limit: Any = None

    def problem(self, name: str) -> Problem:
        suite, special = self.input_output, self.judge.special
        way = "Call-Based" if suite.fn_name or self.starter_code else "Standard Input"
        body = f"{self.question}{self.starter_code}"
        tests = {name: value for name, value in asdict(suite).items() if value is not None}
        if special is None:
            special = bool(SEVERAL.search(self.question)) and self.judge.policy is None
        return Problem(
            task_id=name,
            prompt=f"\nQUESTION:\n{body}\nUse {way} format\nANSWER:\n",
            question=f"{body}\n\nWrite one Python program in {way} format and give it in {FENCED}.",
            tests=json.dumps(tests, ensure_ascii=False),
            stops=STOPS,
            solutions=tuple(self.solutions),
            policy=self.judge.policy or default_policy(self.question, suite.outputs),
            special_judge=special,
            difficulty=self.difficulty or None,
            skills=tuple(self.skill_types),
            seconds=read_seconds(self.time_limit),
            memory_bytes=read_bytes(self.memory_limit),
        )


def read_seconds(value: Any) -> float | None:
    """ "2.0 seconds", "500 ms", "0.5 - 1 seconds" (the longer counts); None: no limit is named."""
    text = str(value or "").lower()
    longest = max(map(float, re.findall(r"\d+(?:\.\d+)?", text)), default=0.0)
    return longest / (1000 if re.search(r"\bms\b|milli", text) else 1) or None


def read_bytes(value: Any) -> int | None:
    """ "256.0 megabytes" and the like; None where no limit is named."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:ilo|ega|iga|i)?b", str(value or "").lower())
    return int(float(match[1]) * 1024 ** " kmg".index(match[2] or " ")) or None if match else None


def default_policy(question: str, outputs: list) -> str:
    """What a careful judge of the problem would do: decimals with a tolerance, letters in any case
    where the statement says so, otherwise token for token."""
    if has_decimals(outputs[:20]):
        return "float"
    return "nocase" if ANY_CASE.search(question) else "strict"


def has_decimals(output: Any) -> bool:
    if isinstance(output, list):
        return any(map(has_decimals, output))
    return isinstance(output, float) or isinstance(output, str) and bool(DECIMAL.search(output))


class HumanEval(Row):
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""

    def problem(self, name: str) -> Problem:
        whole = self.prompt + self.canonical_solution
        return Problem(
            task_id=name,
            prompt=self.prompt,
            question=f"{self.prompt}\nComplete this function. Give the whole program in {FENCED}.",
            tests=assertions([f"{self.test}\ncheck({self.entry_point})\n"]),
            stops=HUMANEVAL_STOPS,
            solutions=(whole,) if self.canonical_solution else (),
            given=self.prompt,
            entry=self.entry_point,
            asserted=True,
        )


class Infilling(HumanEval):
    suffix: str
    entry_point: str | None = None

    def problem(self, name: str) -> Problem:
        if self.entry_point is None and "def check(" in self.test:
            raise ValueError("has a check() and no entry_point to call it with")
        call = f"check({self.entry_point})\n" if self.entry_point else ""
        return Problem(
            task_id=name,
            prompt=self.prompt,
            question=f"```python\n{self.prompt}{HOLE}{self.suffix}\n```\nWhat must stand in place of "
            f"{HOLE}? Give that alone, with its indentation, in {FENCED}.",
            tests=assertions([f"{self.test}\n{call}"]),
            solutions=(f"{self.prompt}{self.canonical_solution}{self.suffix}",),
            given=self.prompt,
            suffix=self.suffix,
            asserted=True,
        )


class Mbpp(Row):
    text: str = Field(validation_alias=AliasChoices("text", "prompt"))
    test_list: list[str] = Field(min_length=1)
    code: str = ""
    test_setup_code: str = ""
    test_imports: list[str] = []

    def problem(self, name: str) -> Problem:
        setup = "\n".join([*self.test_imports, self.test_setup_code]).strip()
        shown = "\n".join(self.test_list)
        return Problem(
            task_id=name,
            prompt=f'"""\n{self.text}\n{shown}\n"""\n',
            question=f"{self.text}\nThese tests must pass:\n{shown}\nGive the whole program in "
            f"{FENCED}.",
            tests=assertions([f"{setup}\n{test}\n" for test in self.test_list]),
            stops=MBPP_STOPS,
            solutions=(self.code,) if self.code else (),
            asserted=True,
        )


def assertions(tests: list[str]) -> str:
    """Each test is standard input: assertions, and on the last line what to print if they hold."""
    words = [hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest() for test in tests]
    inputs = [f"{test}\n{word}" for test, word in zip(tests, words, strict=True)]
    return json.dumps({"inputs": inputs, "outputs": words}, ensure_ascii=False)


def harness(program: str) -> str:
    """The program under its assertions; what it prints itself is not looked at."""
    return HARNESS.format(program=program)


# and the fields by which a row is known
READERS = (
    (Taco, {"input_output"}),
    (Infilling, {"suffix", "test"}),
    (HumanEval, {"entry_point", "test"}),
    (Mbpp, {"test_list"}),
)


def load_problems(
    path: str | Path | None,
    *,
    limit: int | None = None,
    max_bad_fraction: float = 0.05,
    checkers: str | Path | None = None,
) -> ProblemSet:
    """path: None is the shipped set. limit: the first so many problems. checkers: a Python file
    whose CHECKERS is {task id: function(input, expected, got) -> bool}; it is run in this process.
    Rows that are no problems are listed in `bad`; more than max_bad_fraction of them, and duplicate
    ids, raise."""
    if path is None:
        path, checkers = SHIPPED / "problems.jsonl", checkers or SHIPPED / "checkers.py"

    def read(row: dict, place: int) -> Problem:
        """Without an id of its own a row has its place in the file, counted from 0."""
        row = {name: value for name, value in row.items() if value is not None}
        for reader, marks in READERS:
            if marks <= row.keys():
                found = reader.model_validate(row)
                return found.problem(str(place if found.task_id is None else found.task_id))
        raise ValueError(
            "has neither input_output (TACO), entry_point and test (HumanEval), suffix and test "
            "(infilling), nor test_list (MBPP)"
        )

    problems, bad = read_rows(path, read, max_bad_fraction)
    twice = [name for name, n in Counter(p.task_id for p in problems).items() if n > 1]
    if twice:
        raise EagleError(f"{path} has several problems of the id {some(twice)}; give each its own")
    name = Path(path).name
    if checkers is not None:
        problems = plug_in(problems, name, Path(checkers))
    return ProblemSet(problems[:limit], name, bad)


def plug_in(problems: list[Problem], name: str, path: Path) -> list[Problem]:
    """The problems with the checkers that a file has for them."""
    try:
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]  # another may judge otherwise
        checkers = {str(k): v for k, v in runpy.run_path(str(path))["CHECKERS"].items()}
    except Exception as error:  # whatever the file does
        raise EagleError(
            f"no checkers in {path} ({type(error).__name__}: {error}); it must define "
            "CHECKERS = {task id: function(input, expected, got)}"
        ) from error
    if unknown := sorted(checkers.keys() - {p.task_id for p in problems}):
        raise EagleError(
            f"{path} has checkers for problems that {name} does not have: {some(unknown)}"
        )
    changes = {k: {"checker": v, "policy": f"checker {version}"} for k, v in checkers.items()}
    return [replace(p, **changes.get(p.task_id, {})) for p in problems]
