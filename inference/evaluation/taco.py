"""TACO's schema: JSON inside strings, Python literals inside others, limits as prose. (Li et al.,
2023.)
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, Field

from .comparators import POLICIES
from .judge import Suite
from .problem import Problem, identity

STOPS = ("\nQUESTION", "\n---", "\nANSWER")
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


def checked(suite: Suite) -> Suite:
    suite.check()
    return suite


class Judge(BaseModel):
    """Ours: TACO does not say how to compare."""

    policy: Literal[tuple(POLICIES)] | None = None
    special: bool | None = None


class Row(BaseModel):
    question: str = Field(validation_alias=AliasChoices("question", "description"))
    starter_code: str = ""
    input_output: Annotated[Suite, BeforeValidator(from_json), AfterValidator(checked)]
    solutions: Annotated[list[str], BeforeValidator(from_json)] = []
    judge: Annotated[Judge, BeforeValidator(from_json)] = Judge()
    difficulty: str = ""
    skill_types: Annotated[list[str], BeforeValidator(from_literal)] = []
    time_limit: Any = None
    memory_limit: Any = None


def taco_problem(values: dict, place: int) -> Problem:
    """Raises ValueError, which says what is wrong with the row."""
    row = Row.model_validate(values)
    suite, several = row.input_output, SEVERAL.search(row.question) is not None
    called = bool(suite.fn_name or row.starter_code)
    way = "Call-Based" if called else "Standard Input"
    body = f"{row.question}{row.starter_code}"
    tests = {name: value for name, value in asdict(suite).items() if value is not None}
    special = row.judge.special
    if special is None:
        special = several and row.judge.policy is None
    return Problem(
        task_id=identity(values, place),
        prompt=f"\nQUESTION:\n{body}\nUse {way} format\nANSWER:\n",
        question=f"{body}\n\nWrite one Python program in {way} format and give it in one fenced "
        "block.",
        tests=json.dumps(tests, ensure_ascii=False),
        stops=STOPS,
        solutions=tuple(row.solutions),
        policy=row.judge.policy or default_policy(row.question, suite.outputs),
        special_judge=special,
        difficulty=row.difficulty or None,
        skills=tuple(row.skill_types),
        seconds=read_seconds(row.time_limit),
        memory_bytes=read_bytes(row.memory_limit),
    )


def read_seconds(value: Any) -> float | None:
    """ "2.0 seconds", "500 ms", "0.5 - 1 seconds" (the longer counts); None where no limit is
    named."""
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
    if any(map(has_decimals, outputs[:20])):
        return "float"
    return "nocase" if ANY_CASE.search(question) else "strict"


def has_decimals(output: Any) -> bool:
    if isinstance(output, str):
        return DECIMAL.search(output) is not None
    if isinstance(output, list):
        return any(map(has_decimals, output))
    return isinstance(output, float)
