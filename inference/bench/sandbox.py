"""Measure the sandbox: tests per second of trivial programs."""

from __future__ import annotations

import functools
import statistics

from eagle.errors import EagleError
from inference.bench.record import Record
from inference.bench.report import Section, tabulate
from inference.bench.timing import race
from inference.evaluation.sandbox import Job, Program, Sandbox

PROGRAMS = {
    "stdin": ("print(int(input()) + 1)", None, "41\n"),
    "call": ("def add(a, b):\n    return a + b", "add", [1, 2]),
}


def sandbox(
    *,
    tests: int = 400,
    repeats: int = 3,
    workers: int | None = None,
    level: str = "auto",
    json: str | None = None,
) -> None:
    """Run --tests tests of each program --repeats times, over all workers, after a warm-up: a
    program that reads standard input and one whose function is called. --level namespaces or
    rlimits."""
    record = Record("sandbox", sandbox, dict(locals()), "tests", "repeats")
    with Sandbox(None, workers, level, allow_code_execution=True) as box:
        measure(record, box, tests, repeats)
    names = ("level", "program", "workers", "tests_per_second")
    lines = tabulate(record.runs, **{name: name for name in names})
    record.hand_over(record.result(), "trivial programs", [Section("Sandbox", lines)])


def measure(record: Record, box: Sandbox, tests: int, repeats: int) -> None:
    """A row a program: tests per second."""
    count = len(box.workers)

    def run(code: str, name: str | None, given) -> int:
        jobs = [Job(Program(code, name), [given] * (tests // count)) for _ in range(count)]
        outcomes = [outcome for _, outcomes in box.map(jobs) for outcome in outcomes]
        for outcome in outcomes:
            if outcome.status != "ok":
                raise EagleError(f"a trivial program ended with {outcome.status}: {outcome.detail}")
        return len(outcomes)

    works = {name: functools.partial(run, *program) for name, program in PROGRAMS.items()}
    seconds, done = race(works, repeats, record.device)
    for name, spent in seconds.items():
        rates = [round(done[name] / s, 1) for s in spent]
        where = {"level": box.level, "isolation": box.isolation, "workers": count, "program": name}
        record.runs.append({**where, "tests_per_second": statistics.median(rates), "rates": rates})
