"""The stages of an evaluation put together: generation and execution side by side, and what they
leave in the output folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from eagle.meter import Meter

from .executing import HARNESS, JOURNAL, Executor, Rules, Verdict, execution_key, known_verdicts
from .generations import TOO_LONG, Generations, Sample
from .problem import Problem, ProblemSet, some
from .report import Checked, Verdicts

if TYPE_CHECKING:
    from .generating import Generator

CHECKED, EXECUTED = "dataset.json", "execution.json"
MOST_SOLUTIONS = 3  # tried of a problem; one that passes is enough


def verify(problems: ProblemSet, executor: Executor) -> Checked:
    """Run reference solutions: a problem none of whose first ones passes is excluded, with the
    reason."""
    verified, excluded, open_ = [], [], [p for p in problems.problems if p.solutions]
    unverified = [p.task_id for p in problems.problems if not p.solutions]
    with Meter("verified", len(open_), "problems") as meter:
        for attempt in range(MOST_SOLUTIONS):
            futures = {p.task_id: executor.submit(p, p.solutions[attempt]) for p in open_}
            left = []
            for problem in open_:
                verdict = futures[problem.task_id].result()
                if verdict.status == HARNESS:
                    raise EagleError(
                        f"the solution of {problem.task_id} could not be run: {verdict.detail}; "
                        "this is no fault of the problem: repair the cause and run the same "
                        "command again"
                    )
                if verdict.status == "accepted":
                    verified.append(problem.task_id)
                elif attempt + 1 < min(len(problem.solutions), MOST_SOLUTIONS):
                    left.append(problem)
                    continue
                else:
                    why = f"its own solution: {reason(verdict)}"
                    excluded.append({"task_id": problem.task_id, "reason": why})
                meter.add(1, 1)
            open_ = left
    return Checked(problems.fingerprint, verified, excluded, unverified, executor.level)


def reason(verdict: Verdict) -> str:
    at = "" if verdict.failed_at is None else f" in test {verdict.failed_at + 1} of {verdict.tests}"
    detail = " ".join(verdict.detail.split())[:160]
    return f"{verdict.status}{at}" + (f" ({detail})" if detail else "")


def generate_and_execute(
    generator: Generator,
    problems: Sequence[Problem],
    n_samples: int,
    slots: int,
    executor: Executor,
    overlap: bool = True,
) -> tuple[Generations, Verdicts]:
    """Each completion is executed as soon as it is there, or with overlap=False when all are."""
    by_id = {problem.task_id: problem for problem in problems}
    futures: dict[tuple[str, int], Future] = {}

    def take(sample: Sample) -> None:
        futures[sample.name] = submit(executor, by_id[sample.task_id], sample)

    if overlap:
        found = generator.run(problems, n_samples, slots, take)
    else:
        found = generator.run(problems, n_samples, slots)
        for sample in found.samples:
            take(sample)
    return found, results(futures)


def execute(problems: ProblemSet, found: Generations, executor: Executor) -> Verdicts:
    return results({s.name: submit(executor, problems.by_id[s.task_id], s) for s in found.samples})


def submit(executor: Executor, problem: Problem, sample: Sample) -> Future:
    if sample.finish_reason != TOO_LONG:
        return executor.submit(problem, problem.program(sample.output, bool(sample.chat)))
    future: Future = Future()
    future.set_result(Verdict(TOO_LONG))
    return future


def results(futures: dict[tuple[str, int], Future]) -> Verdicts:
    found, there = {}, sum(future.done() for future in futures.values())
    with Meter("executed", len(futures), "programs", done=there) as meter:
        for name, future in futures.items():
            waits = not future.done()
            found[name] = future.result()
            if waits:
                meter.add(1, 1)
    return found


def look_up(problems: ProblemSet, found: Generations, output: Path) -> Verdicts:
    """The verdicts of an execute stage that has run. Raises EagleError for programs that have
    none."""
    rules = Rules(**read(output / EXECUTED, "execute")["rules"])
    known = known_verdicts(output)
    verdicts, missing = {}, []
    for s in found.samples:
        problem = problems.by_id[s.task_id]
        program = problem.program(s.output, bool(s.chat))
        verdict = known.get(execution_key(problem, program, rules))
        if s.finish_reason == TOO_LONG:
            verdict = Verdict(TOO_LONG)
        if verdict is None:
            missing.append(f"{s.task_id}/{s.sample}")
        verdicts[s.name] = verdict
    if missing:
        raise EagleError(
            f"{len(missing)} of {len(found.samples)} programs have no verdict in "
            f"{output / JOURNAL} ({some(missing, 3)}); run the execute stage with this data and "
            "these generations"
        )
    return verdicts


def keep_checked(output: Path, checked: Checked) -> None:
    keep(output / CHECKED, asdict(checked))


def read_checked(output: Path, problems: ProblemSet) -> Checked | None:
    """What verify-dataset found, where it has run on the same problems."""
    if not (output / CHECKED).exists():
        return None
    data = read(output / CHECKED, "verify-dataset")
    checked = Checked(**{name: data[name] for name in Checked.__dataclass_fields__})
    return checked if checked.fingerprint == problems.fingerprint else None


def keep_execution(output: Path, rules: Rules, isolation: dict) -> None:
    """For the score stage, which has to know by which limits the programs were judged."""
    keep(output / EXECUTED, {"rules": asdict(rules), "isolation": isolation})


def keep(path: Path, data: dict) -> None:
    atomic_write_text(path, json.dumps(data, indent=2) + "\n")


def read(path: Path, stage: str) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EagleError(f"cannot read {path} ({error}); run the {stage} stage first") from error
