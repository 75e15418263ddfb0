"""The stages of an evaluation put together: generation and execution side by side, and what they
leave in the output folder."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from eagle.meter import Meter

from . import journal
from .executing import HARNESS, JOURNAL, Executor, Rules, Verdict, read_verdicts
from .generations import TOO_LONG, Generations, Sample
from .problem import Problem, ProblemSet, some
from .report import Checked, Verdicts

CHECKED, EXECUTED = "dataset.json", "execution.json"
MOST_SOLUTIONS = 3  # tried of a problem; one that passes is enough


def verify(problems: ProblemSet, executor: Executor, output: Path) -> Checked:
    """Run reference solutions: a problem none of whose first ones passes is excluded, with the
    reason."""
    passed, failed, left = set(), {}, [p for p in problems.problems if p.solutions]
    for attempt in range(MOST_SOLUTIONS):
        programs = [(p, p.solutions[attempt]) for p in left if attempt < len(p.solutions)]
        run_all(executor, programs, "verified")
        for problem, program in programs:
            verdict = executor.verdicts[executor.rules.key(problem, program)]
            if verdict.status == HARNESS:
                raise EagleError(
                    f"the solution of {problem.task_id} could not be run: {verdict.detail}; this "
                    "is no fault of the problem: repair the cause and run the same command again"
                )
            if verdict.status == "accepted":
                passed.add(problem.task_id)
            failed[problem.task_id] = f"its own solution: {verdict.reason}"
        left = [p for p in left if p.task_id not in passed]
    checked = Checked(
        problems.fingerprint,
        [p.task_id for p in problems.problems if p.task_id in passed],
        [{"task_id": p.task_id, "reason": failed[p.task_id]} for p in left],
        [p.task_id for p in problems.problems if not p.solutions],
        executor.sandbox.level,
    )
    keep(output / CHECKED, asdict(checked))
    return checked


def generate_and_execute(
    generate: Callable[[Callable[[Sample], None]], Generations],
    problems: ProblemSet,
    executor: Executor,
    overlap: bool = True,
) -> Generations:
    """`generate(take)` gives `take` each completion; it is executed as soon as it is there, or with
    overlap=False when all are."""
    if not overlap:
        found = generate(lambda sample: None)
        execute(problems, found, executor)
        return found
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    given, ended = 0, False

    def programs() -> Iterator[tuple[Problem, str] | None]:
        while not (ended and waiting.empty()):
            try:
                yield waiting.get_nowait()
            except queue.Empty:
                yield None

    def take(sample: Sample) -> None:
        nonlocal given
        if running.done():  # only a failure ends it: a full disk, say
            running.result()
        if sample.finish_reason != TOO_LONG:
            waiting.put(program_of(problems, sample))
            given += 1

    with ThreadPoolExecutor(1, "execution") as pool:
        running = pool.submit(executor.run, programs())
        try:
            found = generate(take)
            ended = True
            with Meter("executed", given, "programs", done=executor.done) as executor.meter:
                running.result()
        except BaseException:
            while not waiting.empty():  # what was not begun is given up
                waiting.get_nowait()
            raise
        finally:
            ended = True
    return found


def execute(problems: ProblemSet, found: Generations, executor: Executor) -> None:
    samples = [sample for sample in found.samples if sample.finish_reason != TOO_LONG]
    run_all(executor, [program_of(problems, sample) for sample in samples], "executed")


def run_all(executor: Executor, programs: list[tuple[Problem, str]], name: str) -> None:
    with Meter(name, len(programs), "programs") as meter:
        executor.run(programs, meter)


def program_of(problems: ProblemSet, sample: Sample) -> tuple[Problem, str]:
    problem = problems.by_id[sample.task_id]
    return problem, problem.program(sample.output, bool(sample.chat))


def verdicts_of(
    problems: ProblemSet, found: Generations, rules: Rules, known: Mapping[str, Verdict]
) -> Verdicts:
    """Raises EagleError for programs that have none."""
    verdicts, missing = {}, []
    for sample in found.samples:
        verdict = Verdict(TOO_LONG)
        if sample.finish_reason != TOO_LONG:
            verdict = known.get(rules.key(*program_of(problems, sample)))
        if verdict is None:
            missing.append(f"{sample.task_id}/{sample.sample}")
        verdicts[sample.name] = verdict
    if missing:
        raise EagleError(
            f"{len(missing)} of {len(found.samples)} programs have no verdict in {JOURNAL} "
            f"({some(missing, 3)}); run the execute stage with this data and these generations"
        )
    return verdicts


def keep_execution(output: Path, executor: Executor) -> None:
    """For the score stage, which has to know by which limits the programs were judged."""
    isolation = executor.sandbox.isolation
    keep(output / EXECUTED, {"rules": asdict(executor.rules), "isolation": isolation})


def look_up(problems: ProblemSet, found: Generations, output: Path) -> Verdicts:
    """The verdicts of an execute stage that has run."""
    rules = Rules(**read(output / EXECUTED, "execute")["rules"])
    known = read_verdicts(journal.read(output / JOURNAL))
    return verdicts_of(problems, found, rules, known)


def read_checked(output: Path, problems: ProblemSet) -> Checked | None:
    """What verify-dataset found, where it has run on the same problems."""
    if not (output / CHECKED).exists():
        return None
    data = read(output / CHECKED, "verify-dataset")
    checked = Checked(**{name: data[name] for name in Checked.__dataclass_fields__})
    return checked if checked.fingerprint == problems.fingerprint else None


def keep(path: Path, data: dict) -> None:
    atomic_write_text(path, json.dumps(data, indent=2) + "\n")


def read(path: Path, stage: str) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EagleError(f"cannot read {path} ({error}); run the {stage} stage first") from error
