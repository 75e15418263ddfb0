"""Measure the sandbox: tests per second of trivial programs, at each isolation level that this
machine reaches.
"""

from __future__ import annotations

import functools
import statistics

import torch

from eagle.errors import EagleError

PROGRAMS = {
    "stdin": ("print(int(input()) + 1)", None, "41\n"),
    "call": ("def add(a, b):\n    return a + b", "add", [1, 2]),
}


def sandbox(
    *,
    tests: int = 400,
    repeats: int = 3,
    workers: int | None = None,
    levels: str = "namespaces,rlimits",
    python: str | None = None,
    rlimits_python: str | None = None,
    json: str | None = None,
) -> None:
    """Run --tests tests of each program --repeats times at each of --levels: a program that reads
    standard input and one whose function is called, over all workers, after a warm-up.

    --rlimits_python: another interpreter for that level, which has no view of files of its own:
    started by root, its programs run as user 65534, who must be able to read the interpreter.
    """
    asked = dict(locals())
    from inference.bench.record import hand_over, record_of, require
    from inference.bench.report import Section, tabulate
    from inference.evaluation.sandbox import Sandbox

    require(asked, "tests", "repeats")
    record = record_of("sandbox", sandbox, asked, torch.device("cpu"))
    options = {"workers": workers, "allow_code_execution": True}
    for level in levels.split(","):
        interpreter = rlimits_python if level == "rlimits" and rlimits_python else python
        try:
            box = Sandbox(level=level, python=interpreter, **options)
        except EagleError as error:
            if "," not in levels:
                raise
            record.runs.append({"level": level, "unavailable": str(error)})
            continue
        with box:
            record.runs += rates(box, level, tests, repeats)
    names = ("level", "program", "workers", "tests_per_second", "unavailable")
    lines = tabulate(record.runs, **{name: name for name in names})
    hand_over(record.result(), "trivial programs", [Section("Sandbox", lines)], asked)


def rates(box, level: str, tests: int, repeats: int) -> list[dict]:
    """Tests per second of each program."""
    from inference.bench.timing import race
    from inference.evaluation.sandbox import Job, Program

    count = len(box.workers)

    def run(code: str, name: str | None, given) -> list:
        jobs = [Job(Program(code, name), [given] * (tests // count)) for _ in range(count)]
        return [outcome for _, outcomes in box.map(jobs) for outcome in outcomes]

    works = {name: functools.partial(run, *program) for name, program in PROGRAMS.items()}
    seconds, outcomes = race(works, repeats, torch.device("cpu"))
    found = []
    for name, spent in seconds.items():
        for outcome in outcomes[name]:
            if outcome.status != "ok":
                raise EagleError(f"a trivial program ended with {outcome.status}: {outcome.detail}")
        rates = [round(len(outcomes[name]) / s, 1) for s in spent]
        where = {"level": level, "isolation": box.isolation, "workers": count, "program": name}
        found.append({**where, "tests_per_second": statistics.median(rates), "rates": rates})
    return found
