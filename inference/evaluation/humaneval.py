"""HumanEval's and MBPP's schemas: tests are assertions. (Chen et al., 2021; Austin et al., 2021.)

Assertions run in the program's own process, after it and out of its reading: a program that fails
by mistake cannot pass, one written to deceive could. TACO's tests do not have that limit.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import AliasChoices, BaseModel, Field

from .problem import Problem, identity

HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif __name__", "\nprint(", "\nassert ")
MBPP_STOPS = ('\n"""', "\nassert ", "\nclass Test", "\nif __name__", "\nprint(")
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


class HumanEval(BaseModel):
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""


class Mbpp(BaseModel):
    text: str = Field(validation_alias=AliasChoices("text", "prompt"))
    test_list: list[str] = Field(min_length=1)
    code: str = ""
    test_setup_code: str = ""
    test_imports: list[str] = []


def humaneval_problem(values: dict, place: int) -> Problem:
    row = HumanEval.model_validate(values)
    return Problem(
        task_id=identity(values, place),
        prompt=row.prompt,
        question=f"{row.prompt}\nComplete this function. Give the whole program in one fenced "
        "block.",
        tests=assertions([f"{row.test}\ncheck({row.entry_point})\n"]),
        stops=HUMANEVAL_STOPS,
        solutions=(row.prompt + row.canonical_solution,) if row.canonical_solution else (),
        given=row.prompt,
        entry=row.entry_point,
        asserted=True,
    )


def mbpp_problem(values: dict, place: int) -> Problem:
    row = Mbpp.model_validate(values)
    setup = "\n".join([*row.test_imports, row.test_setup_code]).strip()
    shown = "\n".join(row.test_list)
    return Problem(
        task_id=identity(values, place),
        prompt=f'"""\n{row.text}\n{shown}\n"""\n',
        question=f"{row.text}\nThese tests must pass:\n{shown}\nGive the whole program in one "
        "fenced block.",
        tests=assertions([f"{setup}\n{test}\n" for test in row.test_list]),
        stops=MBPP_STOPS,
        solutions=(row.code,) if row.code else (),
        asserted=True,
    )


def assertions(tests: list[str]) -> str:
    """Each test is standard input: the assertions, and on the last line what to print when they
    hold."""
    words = [hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest() for test in tests]
    inputs = [f"{test}\n{word}" for test, word in zip(tests, words, strict=True)]
    return json.dumps({"inputs": inputs, "outputs": words}, ensure_ascii=False)


def harness(program: str) -> str:
    """The program under its assertions; what it prints itself is not looked at."""
    return HARNESS.format(program=program)
