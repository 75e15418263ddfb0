"""Running programs against their problems' tests, side by side, once each, every verdict kept; and
what the stages leave for each other in the output folder."""

from __future__ import annotations

import hashlib
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from eagle.meter import Meter

from . import journal
from .generations import TOO_LONG, Generations, Sample
from .judge import ACCEPTED, HARNESS, Verdict, make_job
from .problem import Problem, ProblemSet, some
from .problems import harness
from .sandbox import Job, Limits, Sandbox

JOURNAL, CHECKED, EXECUTED = "executions.jsonl", "dataset.json", "execution.json"
MOST_SOLUTIONS = 3  # tried of a problem; one that passes is enough
UNCOMPILED = ("SyntaxError", "IndentationError", "TabError")
Verdicts = Mapping[tuple[str, int], Verdict]


@dataclass(frozen=True)
class Rules:
    """CPU seconds and MiB a test. None: the problem's own, else the sandbox's default."""

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


class Executor(journal.Journal):
    """Verdicts by key: those of the journal in `output`, and what `run` adds to them. None is made
    twice, but for harness errors, which the next run tries again."""

    def __init__(self, sandbox: Sandbox, output: Path, rules: Rules) -> None:
        super().__init__(output / JOURNAL)
        self.sandbox, self.rules = sandbox, rules
        self.verdicts = read_verdicts(self.records)
        self.done, self.meter = 0, None  # of the programs that `run` is given
        self.counting = threading.Lock()

    def run(self, programs: Iterable[tuple[Problem, str]]) -> None:
        for job, _ in self.sandbox.map(self._jobs(programs)):
            key, asserted = job.key
            verdict = asdict(job.observe.verdict(self.sandbox.level))
            # a program under assertions is compiled at run time, by `harness`
            if asserted and verdict["detail"].startswith(UNCOMPILED):
                verdict["status"] = "compile_error"
            self.append({"key": key, "verdict": verdict})
            self.verdicts[key] = Verdict(**verdict)
            self._count()

    def run_all(self, programs: list[tuple[Problem, str]], name: str) -> None:
        with Meter(name, len(programs), "programs") as self.meter:
            self.run(programs)

    def _jobs(self, programs: Iterable[tuple[Problem, str]]) -> Iterator[Job]:
        known = {key for key, verdict in self.verdicts.items() if verdict.status != HARNESS}
        for problem, program in programs:
            key = self.rules.key(problem, program)
            if key in known:
                self._count()
                continue
            known.add(key)
            code = harness(program) if problem.asserted else program
            policy, limits = problem.checker or problem.policy, self.rules.limits(problem)
            yield make_job(code, problem.suite(), policy, limits, (key, problem.asserted))

    def _count(self) -> None:
        with self.counting:  # threads of the sandbox read the programs
            self.done += 1
            if self.meter:
                self.meter.add(1, 1)


def read_verdicts(records: list[dict]) -> dict[str, Verdict]:
    """By key; of several the last one, which a harness error is followed by."""
    return {r["key"]: Verdict(**r["verdict"]) for r in records}


def verified(problems: ProblemSet, checked: dict | None) -> list[Problem]:
    """The problems that `verify` has not excluded. Raises EagleError when that is all."""
    excluded = {row["task_id"] for row in checked["excluded"]} if checked else {}
    kept = [p for p in problems.problems if p.task_id not in excluded]
    if not kept:
        raise EagleError(
            f"all {len(excluded)} problems are excluded: none passes with its own solution, "
            "first {task_id}: {reason}".format(**checked["excluded"][0])
        )
    return kept


def verify(problems: ProblemSet, executor: Executor, output: Path) -> dict:
    """Run reference solutions: a problem none of whose first ones passes is excluded, with the
    reason; "unverified" has none. The result is kept in dataset.json."""
    failed: dict[str, str] = {}  # why; "" where a solution passes
    for attempt in range(MOST_SOLUTIONS):
        left = [p for p in problems.problems if failed.get(p.task_id, "none") != ""]
        programs = [(p, p.solutions[attempt]) for p in left if attempt < len(p.solutions)]
        executor.run_all(programs, "verified")
        for problem, program in programs:
            verdict = executor.verdicts[executor.rules.key(problem, program)]
            if verdict.status == HARNESS:
                raise EagleError(
                    f"the solution of {problem.task_id} could not be run: {verdict.detail}; this "
                    "is no fault of the problem: repair the cause and run the same command again"
                )
            passes = verdict.status == ACCEPTED
            failed[problem.task_id] = "" if passes else f"its own solution: {verdict.reason}"
    checked = {
        "fingerprint": problems.fingerprint,
        "verified": [task for task, reason in failed.items() if not reason],
        "excluded": [{"task_id": task, "reason": why} for task, why in failed.items() if why],
        "unverified": [p.task_id for p in problems.problems if p.task_id not in failed],
        "isolation": executor.sandbox.level,
    }
    keep(output / CHECKED, checked)
    for row in checked["excluded"]:
        print("excluded: {task_id}: {reason}".format(**row), file=sys.stderr)
    said = f"{len(checked['verified'])} of {len(failed)} problems pass with their own solution"
    print(f"{said}; isolation: {checked['isolation']}", file=sys.stderr)
    return checked


def generate_and_execute(
    generate: Callable[[Callable[[Sample], None]], Generations],
    problems: ProblemSet,
    executor: Executor,
) -> Generations:
    """`generate(take)` gives `take` each completion, which is executed as soon as it is there."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    given, executor.done, executor.meter = 0, 0, None

    def take(sample: Sample) -> None:
        nonlocal given
        if running.done():  # only a failure ends it: a full disk, say
            running.result()
        for program in programs_of(problems, [sample]):
            waiting.put(program)
            given += 1

    with ThreadPoolExecutor(1, "execution") as pool:
        running = pool.submit(executor.run, iter(waiting.get, None))
        try:
            found = generate(take)
        except BaseException:
            while not waiting.empty():  # what was not begun is given up
                waiting.get()
            raise
        finally:
            waiting.put(None)
        with Meter("executed", given, "programs", done=executor.done) as executor.meter:
            running.result()
    return found


def programs_of(problems: ProblemSet, samples: list[Sample]) -> list[tuple[Problem, str]]:
    """Of the samples that have one."""
    return [
        (problem, problem.program(sample.output, bool(sample.chat)))
        for sample in samples
        if sample.finish_reason != TOO_LONG
        for problem in [problems.by_id[sample.task_id]]
    ]


def verdicts_of(
    problems: ProblemSet, found: Generations, rules: Rules, known: Mapping[str, Verdict]
) -> Verdicts:
    """Raises EagleError for programs that have none."""
    verdicts, missing = {}, []
    for sample in found.samples:
        verdict = Verdict(TOO_LONG)
        for problem, program in programs_of(problems, [sample]):
            verdict = known.get(rules.key(problem, program))
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


def read_checked(output: Path, problems: ProblemSet) -> dict | None:
    """What `verify` found, where it has run on the same problems."""
    if not (output / CHECKED).exists():
        return None
    checked = read(output / CHECKED, "verify-dataset")
    return checked if checked["fingerprint"] == problems.fingerprint else None


def keep(path: Path, data: dict) -> None:
    atomic_write_text(path, json.dumps(data, indent=2) + "\n")


def read(path: Path, stage: str) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EagleError(f"cannot read {path} ({error}); run the {stage} stage first") from error
