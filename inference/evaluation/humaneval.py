"""HumanEval's and MBPP's schemas: tests are assertions. (Chen et al., 2021; Austin et al., 2021.)

Assertions run in the program's own process, after it and out of its reading: a program that fails
by mistake cannot pass, one written to deceive could. TACO's tests do not have that limit.
"""

from __future__ import annotations

import hashlib

from .problems import Problem, RowError, identity, text_of, to_json

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


def humaneval_problem(row: dict, place: int) -> Problem:
    """{"task_id", "prompt", "entry_point", "test", "canonical_solution"?}"""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    test, solution = text_of(row, "test"), text_of(row, "canonical_solution", default="")
    return Problem(
        task_id=identity(row, place),
        prompt=prompt,
        question=f"{prompt}\nComplete this function. Give the whole program in one fenced block.",
        tests=assertions([f"{test}\ncheck({entry})\n"]),
        stops=HUMANEVAL_STOPS,
        solutions=(prompt + solution,) if solution else (),
        given=prompt,
        entry=entry,
        asserted=True,
    )


def mbpp_problem(row: dict, place: int) -> Problem:
    """{"task_id", "text" or "prompt", "test_list", "code"?, "test_setup_code"?, "test_imports"?}"""
    text, code = text_of(row, "text", "prompt"), text_of(row, "code", default="")
    tests, imports = row.get("test_list"), row.get("test_imports") or []
    for name, lines in (("test_list", tests), ("test_imports", imports)):
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise RowError(f"{name} must be a list of text")
    if not tests:
        raise RowError("test_list has no tests")
    setup = "\n".join([*imports, text_of(row, "test_setup_code", default="")]).strip()
    shown = "\n".join(tests)
    return Problem(
        task_id=identity(row, place),
        prompt=f'"""\n{text}\n{shown}\n"""\n',
        question=f"{text}\nThese tests must pass:\n{shown}\nGive the whole program in one fenced block.",
        tests=assertions([f"{setup}\n{test}\n" for test in tests]),
        stops=MBPP_STOPS,
        solutions=(code,) if code else (),
        asserted=True,
    )


def assertions(tests: list[str]) -> str:
    """Each test is standard input: the assertions, and on the last line what to print when they
    hold.
    """
    words = [hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest() for test in tests]
    inputs = [f"{test}\n{word}" for test, word in zip(tests, words, strict=True)]
    return to_json({"inputs": inputs, "outputs": words})


def harness(program: str) -> str:
    """The program under its assertions; what it prints itself is not looked at."""
    return HARNESS.format(program=program)
