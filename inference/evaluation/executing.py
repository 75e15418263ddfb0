"""Running programs against their problems' tests: side by side, once each, every verdict kept."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
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


class Executor:
    """Programs in, verdicts out, in a thread of its own that drives the sandbox.

    A verdict that the journal has is not made again, and a program that is submitted twice runs
    once. Harness errors are not taken from the journal: the next run tries those programs again.
    """

    def __init__(self, sandbox: Sandbox, output: str | Path, rules: Rules) -> None:
        self.sandbox, self.rules = sandbox, rules
        self.journal = journal.Journal(Path(output) / JOURNAL)
        self.known = verdicts(self.journal.records)
        self._futures: dict[str, Future] = {}
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closing = self._given_up = False
        self._thread = threading.Thread(target=self._work, name="execution", daemon=True)
        self._thread.start()

    @property
    def level(self) -> str:
        return self.sandbox.level

    def submit(self, problem: Problem, program: str) -> Future:
        """-> Future of a Verdict. Raises what earlier programs ran into, such as a full disk."""
        key = execution_key(problem, program, self.rules)
        future = self._futures.get(key)
        if future is None:
            future = self._futures[key] = Future()
            there = self.known.get(key)
            if there is not None and there.status != HARNESS:
                future.set_result(there)
            else:
                self._waiting.put((key, problem, program))
        if self._failure is not None:  # nobody is left to answer
            raise self._failure
        return future

    def _work(self) -> None:
        try:
            for job, _ in self.sandbox.map(self._jobs()):
                key, asserted = job.key
                verdict = summary(job.observe.result(), self.level, asserted)
                self.journal.append({"key": key, "verdict": asdict(verdict)})
                self._futures[key].set_result(verdict)
        except BaseException as error:
            self._failure = error
            for future in list(self._futures.values()):
                if not future.done():
                    future.set_exception(error)

    def _jobs(self) -> Iterator[Job | None]:
        while not self._given_up and not (self._closing and self._waiting.empty()):
            try:
                key, problem, program = self._waiting.get_nowait()
            except queue.Empty:
                yield None  # none yet; what runs goes on
                continue
            code = harness(program) if problem.asserted else program
            limits = self.rules.limits(problem)
            policy = problem.checker or problem.policy
            yield make_job(code, problem.suite(), policy, True, limits, (key, problem.asserted))

    def close(self, wait: bool = True) -> None:
        """wait: for what was submitted; else it is given up."""
        self._given_up = not wait
        self._closing = True
        self._thread.join()
        self.journal.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, kind, *exception) -> None:
        self.close(wait=kind is None)


def summary(result: SuiteResult, isolation: str, asserted: bool = False) -> Verdict:
    """asserted: the program was compiled by `harness`, at run time."""
    status = result.status
    at = next((i for i, v in enumerate(result.verdicts) if v.status == status != "accepted"), None)
    detail = "" if at is None else result.verdicts[at].detail[:400]
    if asserted and status == "runtime_error" and detail.startswith(UNCOMPILED):
        status = "compile_error"
    seconds = round(sum(v.cpu_seconds for v in result.verdicts), 4)
    return Verdict(status, result.tests, at, detail, seconds, isolation)


def execution_key(problem: Problem, program: str, rules: Rules) -> str:
    """The fingerprint under which a verdict is kept: tests, comparison, limits and program."""
    parts = [problem.fingerprint, asdict(rules.limits(problem)), program]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def verdicts(records: list[dict]) -> dict[str, Verdict]:
    """By key; of several the last one, as a harness error is followed by what came of the next
    try."""
    return {r["key"]: Verdict(**r["verdict"]) for r in records}


def known_verdicts(output: Path) -> dict[str, Verdict]:
    path = output / JOURNAL
    return verdicts(journal.read(path)) if path.exists() else {}
