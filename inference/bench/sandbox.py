"""Measure the sandbox: tests per second of trivial programs, at each isolation level that this
machine reaches.

    python -m inference.bench.sandbox

Two programs, one that reads standard input and one whose function is called, over all workers,
  after a warm-up.
The last line is one JSON object: the median of --repeats, and every single figure.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

from configs import cli

PROGRAMS = {
    "stdin": ("print(int(input()) + 1)", None, "41\n"),
    "call": ("def add(a, b):\n    return a + b", "add", [1, 2]),
}


def bench_sandbox(
    *,
    tests: int = 400,
    repeats: int = 3,
    workers: int | None = None,
    levels: str = "namespaces,rlimits",
    python: str | None = None,
    rlimits_python: str | None = None,
) -> None:
    """Run --tests tests of each program --repeats times at each of --levels.

    --rlimits_python: another interpreter for that level, which has no view of files of its own:
    started by root, its programs run as user 65534, who must be able to read the interpreter.
    """
    from eagle.errors import EagleError
    from inference.evaluation.sandbox import Job, Program, Sandbox

    if tests < 1 or repeats < 1:
        raise EagleError("tests and repeats must be at least 1")
    report = {"cores": len(os.sched_getaffinity(0)), "tests": tests, "levels": {}}
    for level in levels.split(","):
        interpreter = rlimits_python if level == "rlimits" and rlimits_python else python
        try:
            sandbox = Sandbox(
                workers=workers, level=level, allow_code_execution=True, python=interpreter
            )
        except EagleError as error:
            if len(levels.split(",")) == 1:
                raise
            report["levels"][level] = {"unavailable": str(error)}
            continue
        with sandbox:
            count = len(sandbox.workers)
            result = {"isolation": sandbox.isolation, "workers": count, "tests_per_second": {}}
            for name, (code, fn_name, given) in PROGRAMS.items():
                jobs = [
                    Job(Program(code, fn_name), [given] * (tests // count)) for _ in range(count)
                ]
                rates = []
                for round_ in range(repeats + 1):
                    started = time.perf_counter()
                    outcomes = [o for _, outcomes in sandbox.map(jobs) for o in outcomes]
                    if round_:
                        rates.append(len(outcomes) / (time.perf_counter() - started))
                failed = [o for o in outcomes if o.status != "ok"]
                if failed:
                    raise EagleError(
                        f"a trivial program ended with {failed[0].status}: {failed[0].detail}"
                    )
                result["tests_per_second"][name] = round(statistics.median(rates), 1)
                result[f"{name}_rates"] = [round(rate, 1) for rate in rates]
                print(f"{level} {name}: {statistics.median(rates):.0f} tests/s", file=sys.stderr)
            report["levels"][level] = result
    print(json.dumps(report))


if __name__ == "__main__":
    cli.main(bench_sandbox)
