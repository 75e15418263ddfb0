"""Say whether what a program did is right: comparison policies, verdicts, suites.

    suite = Suite(inputs=["1 2\\n"], outputs=["3\\n"])
    result = run_and_judge(sandbox, code, suite, "strict")
    result.status, [verdict.status for verdict in result.verdicts]      # ("accepted", ["accepted"])

A policy is a name in POLICIES (`comparators.py` says what each accepts) or, for problems with many
right answers, a function `checker(input, expected, got) -> bool`. The comparison happens here, in
the parent. Knows nothing of how programs are run, nor of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from eagle.errors import EagleError

from .comparators import POLICIES
from .sandbox import Job, Limits, Outcome, Program, Sandbox, TestInput

VERDICTS = (
    "accepted",
    "wrong",
    "timeout",
    "memory",
    "output_limit",
    "runtime_error",
    "compile_error",
    "harness_error",
)
# names that call-based problems take for granted, as the sites that they come from provide them
PRELUDE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
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


def resolve(policy: str | Checker, call_based: bool) -> Checker:
    """The checker that a policy stands for. Raises EagleError for an unknown name."""
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise EagleError(
            f"unknown comparison policy {policy!r}; known: {', '.join(POLICIES)}, or a function"
        )
    compare = POLICIES[policy][call_based]
    return lambda _, expected, got: compare(expected, got)


def _is_text(item: Any) -> bool:
    return isinstance(item, str) or (
        isinstance(item, list) and all(isinstance(line, (str, int, float)) for line in item)
    )


def _text(item: str | list) -> str:
    return item if isinstance(item, str) else "\n".join(map(str, item))


def _restore_keys(arguments: list) -> list:
    """JSON makes every key of a dict a string; TACO's calls mean integers where its only argument
    has none else.
    """
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        try:
            return [{int(key): value for key, value in arguments[0].items()}]
        except ValueError:
            pass
    return arguments


@dataclass
class Suite:
    """Tests of one problem, as TACO's `input_output` has them.

    Without `fn_name` an input is standard input and an output is what to print: text, or a list of
    lines. With it an input is a list of arguments and an output the value to return, often wrapped
    in a one-item list.
    """

    inputs: list
    outputs: list
    fn_name: str | None = None

    def check(self) -> None:
        """Raises EagleError on a suite that could judge nothing, or not what it seems to."""
        if not isinstance(self.inputs, list) or not isinstance(self.outputs, list):
            raise EagleError("a suite's inputs and outputs must be lists")
        if not self.inputs:
            raise EagleError(
                "a suite without tests would accept every program; leave the problem out"
            )
        if len(self.inputs) != len(self.outputs):
            raise EagleError(
                f"{len(self.inputs)} inputs but {len(self.outputs)} outputs in a suite"
            )
        for index, (given, expected) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if self.fn_name is not None:
                if not isinstance(given, list):
                    raise EagleError(
                        f"input {index} of a call must be a list of arguments, not {given!r:.60}"
                    )
            elif not _is_text(given) or not _is_text(expected):
                raise EagleError(
                    f"test {index}: standard input and output are text or lists of lines"
                )

    def tests(self) -> list[TestInput]:
        """What the sandbox is given."""
        if self.fn_name is None:
            return [_text(item) for item in self.inputs]
        return [_restore_keys(arguments) for arguments in self.inputs]


@dataclass(frozen=True)
class Verdict:
    """`status` is one of VERDICTS."""

    status: str
    detail: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    retried: bool = False


@dataclass(frozen=True)
class SuiteResult:
    """A program on a suite. `verdicts` may stop at the first failure; `tests` counts the whole
    suite.
    """

    verdicts: list[Verdict]
    tests: int

    @property
    def status(self) -> str:
        """The first failure that is the program's, else `harness_error` if there was one, else
        `accepted`.
        """
        failures = [v.status for v in self.verdicts if v.status != "accepted"]
        own = [status for status in failures if status != "harness_error"]
        if own:
            return own[0]
        return "accepted" if not failures and len(self.verdicts) == self.tests else "harness_error"

    @property
    def accepted(self) -> bool:
        return self.status == "accepted"

    @property
    def passed(self) -> int:
        """Tests with a right answer."""
        return sum(v.status == "accepted" for v in self.verdicts)


@dataclass(eq=False)
class Grading:
    """Judges the outcomes of one program as they come; may serve as `Job.observe`.

    Where every output of a call-based suite is a one-item list, either each is wrapped or none is.
      A program is
    judged under both readings and given the better one: the same for all its tests.
    """

    suite: Suite
    policy: str | Checker = "strict"
    stop_at_first_failure: bool = False
    readings: list[list[Verdict]] = field(init=False)

    def __post_init__(self) -> None:
        self.suite.check()
        self._accepts = resolve(self.policy, self.suite.fn_name is not None)
        outputs = self.suite.outputs
        legacy = self.policy == "taco_legacy"
        wrapped = all(isinstance(item, list) and len(item) == 1 for item in outputs)
        both = self.suite.fn_name is not None and wrapped and not legacy
        self._tests = self.suite.tests()
        if self.suite.fn_name is None:
            self._expected = [[_text(item) for item in outputs]]
        else:
            self._expected = [outputs] + ([[item[0] for item in outputs]] if both else [])
        self.readings = [[] for _ in self._expected]

    def __call__(self, index: int, outcome: Outcome) -> bool:
        """Take the outcome of test `index`; True when the rest need not run."""
        for expected, verdicts in zip(self._expected, self.readings, strict=True):
            assert index == len(verdicts), "outcomes come in the order of the tests"
            verdicts.append(self._verdict(self._tests[index], expected[index], outcome))
        undecided = ("accepted", "harness_error")
        failed = all(any(v.status not in undecided for v in row) for row in self.readings)
        return self.stop_at_first_failure and failed

    def result(self) -> SuiteResult:
        best = max(
            self.readings, key=lambda verdicts: sum(v.status == "accepted" for v in verdicts)
        )
        return SuiteResult(best, len(self._tests))

    def _verdict(self, given: TestInput, expected: Any, outcome: Outcome) -> Verdict:
        status, detail = outcome.status, outcome.detail
        if status == "ok":
            got = outcome.stdout if self.suite.fn_name is None else outcome.value
            try:
                status = "accepted" if self._accepts(given, expected, got) else "wrong"
            except Exception as error:  # a checker of a problem, not the program
                status, detail = "harness_error", f"checker: {type(error).__name__}: {error}"
        return Verdict(status, detail, outcome.seconds, outcome.cpu_seconds, outcome.retried)


def judge(
    suite: Suite, outcomes: Sequence[Outcome], policy: str | Checker = "strict"
) -> list[Verdict]:
    """One verdict for each outcome, which are those of the suite's first tests."""
    grading = Grading(suite, policy)
    if len(outcomes) > len(suite.inputs):
        raise EagleError(f"{len(outcomes)} outcomes for {len(suite.inputs)} tests")
    for index, outcome in enumerate(outcomes):
        grading(index, outcome)
    return grading.result().verdicts


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
    prelude = PRELUDE if suite.fn_name is not None else ""
    program = Program(code, suite.fn_name, prelude)
    return Job(program, suite.tests(), key, limits, grading, keep_output=False)


def run_and_judge(
    sandbox: Sandbox,
    code: str,
    suite: Suite,
    policy: str | Checker = "strict",
    stop_at_first_failure: bool = False,
    limits: Limits | None = None,
) -> SuiteResult:
    """Run one program on a suite and judge it."""
    job = make_job(code, suite, policy, stop_at_first_failure, limits)
    for _ in sandbox.map([job]):
        pass
    return job.observe.result()
