"""Say whether what a program did is right: suites of tests, verdicts.

    suite = Suite(inputs=["1 2\\n"], outputs=["3\\n"])
    result = run_and_judge(sandbox, code, suite, "strict")
    result.status, [verdict.status for verdict in result.verdicts]      # ("accepted", ["accepted"])

A policy is a name in POLICIES (`comparators.py` says what each accepts) or, for problems with many
right answers, a function `checker(input, expected, got) -> bool`. The comparison happens here, in
the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eagle.errors import EagleError

from .comparators import POLICIES
from .sandbox import STATUSES, Job, Limits, Outcome, Program, Sandbox, TestInput

VERDICTS = ("accepted", "wrong", *STATUSES[1:])  # of what ran "ok", one of the first two
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
    """Tests of one problem, as TACO's `input_output` has them.

    Without `fn_name` an input is standard input and an output is what to print: text, or a list of
    lines. With it an input is a list of arguments and an output the value to return, often wrapped
    in a one-item list."""

    inputs: list
    outputs: list
    fn_name: str | None = None

    def check(self) -> None:
        """Raises EagleError on a suite that could judge nothing, or not what it seems to."""
        if not (isinstance(self.inputs, list) and isinstance(self.outputs, list)):
            raise EagleError("a suite's inputs and outputs must be lists")
        if not self.inputs:
            raise EagleError("a suite without tests accepts every program; leave the problem out")
        counts = len(self.inputs), len(self.outputs)
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
    """JSON makes every key of a dict a string; TACO's calls mean integers where their only argument
    has nothing else."""
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        try:
            return [{int(key): value for key, value in arguments[0].items()}]
        except ValueError:
            pass
    return arguments


@dataclass(frozen=True)
class SuiteResult:
    """A program on a suite: outcomes whose `status` is one of VERDICTS, and which have lost their
    output. They may stop at the first failure; `tests` counts the whole suite."""

    verdicts: list[Outcome]
    tests: int

    @property
    def status(self) -> str:
        """The first failure that is the program's, else "harness_error" if there was one."""
        failures = [v.status for v in self.verdicts if v.status != "accepted"]
        own = [status for status in failures if status != "harness_error"]
        if own:
            return own[0]
        return "accepted" if not failures and len(self.verdicts) == self.tests else "harness_error"


class Grading:
    """Judges the outcomes of one program as they come; may serve as `Job.observe`.

    Where a suite has two readings, the program gets the one that accepts more, for all its tests.
    """

    def __init__(
        self, suite: Suite, policy: str | Checker = "strict", stop_at_first_failure: bool = False
    ) -> None:
        suite.check()
        self._call = suite.fn_name is not None
        self._policy, self._stop = policy, stop_at_first_failure
        self._tests = suite.tests()
        self._expected = suite.readings()
        self._verdicts: list[list[Outcome]] = [[] for _ in self._expected]

    def __call__(self, index: int, outcome: Outcome) -> bool:
        """Take the outcome of test `index`; True when the rest need not run."""
        for expected, verdicts in zip(self._expected, self._verdicts, strict=True):
            assert index == len(verdicts), "outcomes come in the order of the tests"
            verdicts.append(self._verdict(self._tests[index], expected[index], outcome))
        undecided = ("accepted", "harness_error")
        return self._stop and all(
            any(v.status not in undecided for v in verdicts) for verdicts in self._verdicts
        )

    def result(self) -> SuiteResult:
        best = max(self._verdicts, key=lambda row: sum(v.status == "accepted" for v in row))
        return SuiteResult(best, len(self._tests))

    def _verdict(self, given: TestInput, expected: Any, outcome: Outcome) -> Outcome:
        status, detail = outcome.status, outcome.detail
        if status == "ok":
            got = outcome.value if self._call else outcome.stdout
            try:
                if callable(self._policy):
                    right = self._policy(given, expected, got)
                else:
                    right = POLICIES[self._policy][self._call](expected, got)
                status = "accepted" if right else "wrong"
            except Exception as error:  # a checker of a problem, not the program
                status, detail = "harness_error", f"checker: {type(error).__name__}: {error}"
        return replace(outcome, status=status, detail=detail, stdout=b"", value=None)


def make_job(
    code: str,
    suite: Suite,
    policy: str | Checker = "strict",
    stop_at_first_failure: bool = False,
    limits: Limits | None = None,
    key: Any = None,
) -> Job:
    """For `Sandbox.map`; when it comes back, `job.observe.result()` is the SuiteResult."""
    grading = Grading(suite, policy, stop_at_first_failure)
    program = Program(code, suite.fn_name, PRELUDE if suite.fn_name is not None else "")
    return Job(program, suite.tests(), key, limits, grading)


def run_and_judge(sandbox: Sandbox, code: str, suite: Suite, *rules: Any) -> SuiteResult:
    """Run one program on a suite and judge it; `rules` as those of `make_job`."""
    [(job, _)] = sandbox.map([make_job(code, suite, *rules)])
    return job.observe.result()
