"""Say whether what a program did is right: suites of tests, verdicts.

    suite = Suite(inputs=["1 2\\n"], outputs=["3\\n"])
    [(job, _)] = sandbox.map([make_job(code, suite, "strict")])
    job.observe.verdict()                          # Verdict("accepted", …)

A policy is a name in POLICIES (`comparators.py` says what each accepts) or, for problems with many
right answers, a function `checker(input, expected, got) -> bool`. The comparison happens here, in
the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eagle.errors import EagleError

from .comparators import accepts
from .sandbox import STATUSES, Job, Limits, Outcome, Program, TestInput

ACCEPTED, HARNESS = "accepted", "harness_error"
VERDICTS = (ACCEPTED, "wrong", *STATUSES[1:])  # of what ran "ok", one of the first two
# names that call-based problems take for granted, as the sites that they come from provide them
PRELUDE = """\
import bisect, collections, copy, functools, heapq, itertools, math
import operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""

Checker = Callable[[TestInput, Any, Any], bool]  # (input, expected, what the program made of it)


@dataclass
class Suite:
    """Tests of one problem, as TACO's `input_output` has them. Without `fn_name` an input is
    standard input and an output is what to print: text, or a list of lines. With it an input is a
    list of arguments and an output the value to return, often wrapped in a one-item list."""

    inputs: list
    outputs: list
    fn_name: str | None = None

    def __post_init__(self) -> None:
        """Raises EagleError on a suite that could judge nothing, or not what it seems to."""
        counts = len(self.inputs), len(self.outputs)
        if not all(counts):
            raise EagleError("a suite without tests accepts every program; leave the problem out")
        if counts[0] != counts[1]:
            raise EagleError("{} inputs but {} outputs in a suite".format(*counts))
        for index, (given, expected) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if self.fn_name is None and not (_is_text(given) and _is_text(expected)):
                raise EagleError(f"test {index}: input and output are text or lists of lines")
            if self.fn_name is not None and not isinstance(given, list):
                raise EagleError(f"test {index}: a call's input is a list of arguments")

    def tests(self) -> list[TestInput]:
        """What the sandbox is given."""
        return list(map(_text if self.fn_name is None else _restore_keys, self.inputs))

    def readings(self) -> list[list]:
        """The outputs. Where each output of calls is a one-item list, also without these lists:
        either each value was wrapped or none was."""
        if self.fn_name is None:
            return [list(map(_text, self.outputs))]
        if all(isinstance(item, list) and len(item) == 1 for item in self.outputs):
            return [self.outputs, [item[0] for item in self.outputs]]
        return [self.outputs]


def _is_text(item: Any) -> bool:
    if isinstance(item, list):
        return all(isinstance(line, (str, int, float)) for line in item)
    return isinstance(item, str)


def _text(item: str | list) -> str:
    return item if isinstance(item, str) else "\n".join(map(str, item))


def _restore_keys(arguments: list) -> list:
    """JSON made each key a string; TACO's only argument means integers where all can be."""
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        try:
            return [{int(key): value for key, value in arguments[0].items()}]
        except ValueError:
            pass
    return arguments


@dataclass(frozen=True)
class Verdict:
    """What became of one program. failed_at: the first test that it failed; detail: why."""

    status: str
    tests: int = 0
    failed_at: int | None = None
    detail: str = ""
    cpu_seconds: float = 0.0
    isolation: str = ""

    @property
    def reason(self) -> str:
        at = "" if self.failed_at is None else f" in test {self.failed_at + 1} of {self.tests}"
        detail = " ".join(self.detail.split())[:160]
        return f"{self.status}{at}" + (f" ({detail})" if detail else "")


class Grading:
    """Judges the outcomes of one program as they come: a `Job.observe`, which ends the job at the
    first failure that is the program's. Of two readings it gets the one that accepts more."""

    def __init__(self, suite: Suite, policy: str | Checker) -> None:
        self.policy, self.call = policy, suite.fn_name is not None
        self.inputs, self.readings = suite.tests(), suite.readings()
        self.found: list[list[tuple[str, str]]] = [[] for _ in self.readings]  # status and detail
        self.cpu_seconds = 0.0

    def __call__(self, index: int, outcome: Outcome) -> bool:
        """Take the outcome of test `index`; True when the rest need not run."""
        self.cpu_seconds += outcome.cpu_seconds
        for expected, found in zip(self.readings, self.found, strict=True):
            found.append(self._judge(self.inputs[index], expected[index], outcome))
        return all(any(s not in (ACCEPTED, HARNESS) for s, _ in found) for found in self.found)

    def verdict(self, isolation: str = "") -> Verdict:
        """The first failure that is the program's, else the harness's if there was one."""
        best = max(self.found, key=lambda found: sum(status == ACCEPTED for status, _ in found))
        failed = [(s == HARNESS, at, s, d) for at, (s, d) in enumerate(best) if s != ACCEPTED]
        _, at, status, detail = min(failed, default=(False, None, ACCEPTED, ""))
        seconds = round(self.cpu_seconds, 4)
        return Verdict(status, len(self.inputs), at, detail[:400], seconds, isolation)

    def _judge(self, given: TestInput, expected: Any, outcome: Outcome) -> tuple[str, str]:
        if outcome.status != "ok":
            return outcome.status, outcome.detail
        got = outcome.value if self.call else outcome.stdout
        try:
            if callable(self.policy):
                right = self.policy(given, expected, got)
            else:
                right = accepts(self.policy, expected, got)
        except Exception as error:  # a checker of a problem, not the program
            return HARNESS, f"checker: {type(error).__name__}: {error}"
        return (ACCEPTED if right else "wrong"), ""


def make_job(
    code: str,
    suite: Suite,
    policy: str | Checker = "strict",
    limits: Limits | None = None,
    key: Any = None,
) -> Job:
    """For `Sandbox.map`; when it comes back, `job.observe.verdict()` is known."""
    program = Program(code, suite.fn_name, PRELUDE if suite.fn_name is not None else "")
    return Job(program, suite.tests(), key, limits, Grading(suite, policy))
