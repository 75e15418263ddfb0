"""TACO's schema: JSON inside strings, Python literals inside others, limits as prose. (Li et al.,
2023.)
"""

from __future__ import annotations

import ast
import json
import re

from eagle.errors import EagleError
from inference.evaluation.comparators import POLICIES
from inference.evaluation.judge import Suite

from .problems import Problem, RowError, identity, text_of, to_json

STOPS = ("\nQUESTION", "\n---", "\nANSWER")
# the data does not say which problems have several right answers; their statements do
SEVERAL = re.compile(
    r"if there (?:are|is|exists?) (?:multiple|several|many|more than one)|\bany (?:of them|one of|valid|correct)"
    r"|\b(?:print|output|return|find) any\b|\bin any order\b|\bany order\b",
    re.I,
)
ANY_CASE = re.compile(
    r"\b(?:any|either) (?:letter )?case\b|upper or lower|case[- ]insensitive", re.I
)
DECIMAL = re.compile(r"(?<!\S)[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?!\S)")


def taco_problem(row: dict, place: int) -> Problem:
    """Raises RowError, which says what is wrong with the row."""
    question = text_of(row, "question", "description")
    starter = text_of(row, "starter_code", default="")
    tests = read_tests(row.get("input_output"))
    solutions = read_json(row.get("solutions") or "[]", "solutions")
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise RowError("solutions must be a list of programs")
    called = bool(tests.get("fn_name") or starter)
    way = "Call-Based" if called else "Standard Input"
    body = f"{question}{starter}"
    mark = read_json(row.get("judge") or "{}", "judge")
    if not isinstance(mark, dict) or mark.get("policy", "strict") not in POLICIES:
        raise RowError(f"judge must be an object with a policy of {', '.join(POLICIES)}")
    return Problem(
        task_id=identity(row, place),
        prompt=f"\nQUESTION:\n{body}\nUse {way} format\nANSWER:\n",
        question=f"{body}\n\nWrite one Python program in {way} format and give it in one fenced block.",
        tests=to_json(tests),
        stops=STOPS,
        solutions=tuple(solutions),
        policy=mark.get("policy") or default_policy(question, tests),
        special_judge=bool(
            mark.get("special", mark.get("policy") is None and SEVERAL.search(question))
        ),
        difficulty=text_of(row, "difficulty", default="") or None,
        skills=tuple(read_literal(row.get("skill_types"), "skill_types")),
        seconds=read_seconds(row.get("time_limit")),
        memory_bytes=read_bytes(row.get("memory_limit")),
    )


def read_json(value, name: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{name} is not JSON ({error})") from error


def read_tests(value) -> dict:
    tests = read_json(value, "input_output") if value else {}
    if not isinstance(tests, dict):
        raise RowError("input_output must be an object of inputs and outputs")
    inputs, outputs, name = (tests.get(key) for key in ("inputs", "outputs", "fn_name"))
    if name is not None and not isinstance(name, str):
        raise RowError(f"fn_name must be text, not {name!r}")
    try:
        Suite(inputs, outputs, name or None).check()
    except EagleError as error:
        raise RowError(f"input_output: {error}") from error
    return {"inputs": inputs, "outputs": outputs, **({"fn_name": name} if name else {})}


def read_literal(value, name: str) -> list[str]:
    """Tags: a Python list in a string, or a list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError) as error:
            raise RowError(f"{name} is no Python literal ({value[:40]!r})") from error
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise RowError(f"{name} must be a list of text")
    return value


def read_seconds(value) -> float | None:
    """ "2.0 seconds", "500 ms", "0.5 - 1 seconds" (the longer counts); None where no limit is
    named.
    """
    text = str(value or "").lower()
    found = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]
    if not found or not max(found):
        return None
    return max(found) / (1000 if re.search(r"\bms\b|milli", text) else 1)


def read_bytes(value) -> int | None:
    """ "256.0 megabytes" and the like; None where no limit is named."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:ilo|ega|iga|i)?b", str(value or "").lower())
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * 1024 ** " kmg".index(match[2] or " "))


def default_policy(question: str, tests: dict) -> str:
    """What a careful judge of the problem would do: decimals with a tolerance, letters in any case
    where the statement says so, otherwise token for token."""
    if any(has_decimals(output) for output in tests["outputs"][:20]):
        return "float"
    return "nocase" if ANY_CASE.search(question) else "strict"


def has_decimals(output) -> bool:
    if isinstance(output, str):
        return DECIMAL.search(output) is not None
    if isinstance(output, list):
        return any(map(has_decimals, output))
    return isinstance(output, float)
