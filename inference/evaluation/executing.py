"""Running programs against their problems' tests: side by side, once each, every verdict kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import journal
from .humaneval import harness
from .judge import SuiteResult, make_job
from .problem import Problem
from .sandbox import Job, Limits, Sandbox

JOURNAL = "executions.jsonl"
HARNESS = "harness_error"
UNCOMPILED = ("SyntaxError", "IndentationError", "TabError")


@dataclass(frozen=True)
class Rules:
    """Limits of a test that replace the problems' own: CPU seconds and MiB of memory. None: the
    problem's, else the sandbox's default."""

    seconds: float | None = None
    memory_mb: int | None = None

    def limits(self, problem: Problem) -> Limits:
        usual = Limits()
        seconds = self.seconds or problem.seconds or usual.cpu_seconds
        # a problem's limit is meant for what the program keeps; the default leaves room for Python
        # itself
        memory = (self.memory_mb or 0) * 2**20 or max(problem.memory_bytes or 0, usual.memory_bytes)
        return Limits(cpu_seconds=seconds, wall_seconds=3 * seconds, memory_bytes=memory)

    def key(self, problem: Problem, program: str) -> str:
        """The fingerprint under which a verdict is kept: tests, comparison, limits and program."""
        parts = [problem.fingerprint, asdict(self.limits(problem)), program]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What became of one program. failed_at: the first test that it failed; detail: why, for
    people."""

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


class Executor:
    """Verdicts by key: those of the journal in `output`, and what `run` adds to them.

    A verdict that is there is not made again, and a program that is given twice runs once. Harness
    errors do not count as there: the next run tries those programs again."""

    def __init__(self, sandbox: Sandbox, output: Path, rules: Rules) -> None:
        self.sandbox, self.rules = sandbox, rules
        self.journal = journal.Journal(output / JOURNAL)
        self.verdicts = read_verdicts(self.journal.records)
        self.done = 0  # programs that have a verdict, of those that `run` was given

    def run(self, programs: Iterable[tuple[Problem, str] | None], meter=None) -> None:
        """None: no program yet, ask again."""
        self.done, self.meter = 0, meter
        for job, _ in self.sandbox.map(self._jobs(programs)):
            key, asserted = job.key
            verdict = summary(job.observe.result(), self.sandbox.level, asserted)
            self.journal.append({"key": key, "verdict": asdict(verdict)})
            self.verdicts[key] = verdict
            self._count()

    def _jobs(self, programs: Iterable[tuple[Problem, str] | None]) -> Iterator[Job | None]:
        known = {key for key, verdict in self.verdicts.items() if verdict.status != HARNESS}
        for given in programs:
            if given is None:
                yield None
                continue
            problem, program = given
            key = self.rules.key(problem, program)
            if key in known:
                self._count()
                continue
            known.add(key)
            code = harness(program) if problem.asserted else program
            limits = self.rules.limits(problem)
            policy = problem.checker or problem.policy
            yield make_job(code, problem.suite(), policy, True, limits, (key, problem.asserted))

    def _count(self) -> None:
        self.done += 1
        if self.meter:
            self.meter.add(1, 1)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exception) -> None:
        self.journal.close()


def summary(result: SuiteResult, isolation: str, asserted: bool = False) -> Verdict:
    """asserted: the program was compiled by `harness`, at run time."""
    status = result.status
    at = next((i for i, v in enumerate(result.verdicts) if v.status == status != "accepted"), None)
    detail = "" if at is None else result.verdicts[at].detail[:400]
    if asserted and status == "runtime_error" and detail.startswith(UNCOMPILED):
        status = "compile_error"
    seconds = round(sum(v.cpu_seconds for v in result.verdicts), 4)
    return Verdict(status, result.tests, at, detail, seconds, isolation)


def read_verdicts(records: list[dict]) -> dict[str, Verdict]:
    """By key; of several the last one, as a harness error is followed by what came of the next
    try."""
    return {r["key"]: Verdict(**r["verdict"]) for r in records}
