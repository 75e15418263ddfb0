"""The stages of an evaluation put together: generation and execution side by side, then scores and
files.

Knows the stages; knows nothing of the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.errors import EagleError
from inference.generate import write_text

from .executing import JOURNAL, Executor, Rules, Verdict, execution_key, known_verdicts
from .generations import TOO_LONG, Generations, Sample, write_upstream
from .mutants import mutants
from .problems import Problem, ProblemSet, some
from .progress import Progress
from .report import HARNESS, Checked, against, dataset_facts, score, write_metrics, write_report

if TYPE_CHECKING:  # it brings torch along, which the stages without a model do not need
    from .generating import Generator

CHECKED, EXECUTED = "dataset.json", "execution.json"
MOST_SOLUTIONS = 3  # tried of a problem; one that passes is enough


def verify(problems: ProblemSet, executor: Executor) -> Checked:
    """Run reference solutions: a problem none of whose first ones passes is excluded, with the
    reason.
    """
    verified, excluded, open_ = [], [], [p for p in problems.problems if p.solutions]
    unverified = [p.task_id for p in problems.problems if not p.solutions]
    with Progress(verify=len(open_)) as progress:
        for attempt in range(MOST_SOLUTIONS):
            futures = {p.task_id: executor.submit(p, p.solutions[attempt]) for p in open_}
            left = []
            for problem in open_:
                verdict = futures[problem.task_id].result()
                if verdict.status == HARNESS:
                    raise EagleError(
                        f"the solution of {problem.task_id} could not be run: {verdict.detail}; this is no fault of the "
                        "problem: repair the cause and run the same command again"
                    )
                if verdict.status == "accepted":
                    verified.append(problem.task_id)
                elif attempt + 1 < min(len(problem.solutions), MOST_SOLUTIONS):
                    left.append(problem)
                    continue
                else:
                    why = f"its own solution: {reason(verdict)}"
                    excluded.append({"task_id": problem.task_id, "reason": why})
                progress.step("verify")
            open_ = left
    return Checked(problems.fingerprint, verified, excluded, unverified, executor.level)


def reason(verdict: Verdict) -> str:
    at = "" if verdict.failed_at is None else f" in test {verdict.failed_at + 1} of {verdict.tests}"
    detail = " ".join(verdict.detail.split())[:160]
    return f"{verdict.status}{at}" + (f" ({detail})" if detail else "")


def try_mutants(problems: ProblemSet, checked: Checked, executor: Executor, limit: int) -> dict:
    """Do the tests notice mistakes? Runs mutants of each verified problem's first solution, `limit`
    a problem.
    """
    futures = []
    for task in checked.verified:
        problem = problems.by_id[task]
        for number, code in enumerate(mutants(problem.solutions[0], limit)):
            futures.append((task, number, code, executor.submit(problem, code)))
    survivors = []
    with Progress(mutants=len(futures)) as progress:
        for task, number, code, future in futures:
            if future.result().status == "accepted":
                survivors.append({"task_id": task, "mutant": number, "code": code})
            progress.step("mutants")
    return {"mutants": len(futures), "accepted": len(survivors), "survivors": survivors}


def generate_and_execute(
    generator: Generator,
    problems: Sequence[Problem],
    n_samples: int,
    slots: int,
    executor: Executor | None,
    overlap: bool = True,
) -> tuple[Generations, dict[tuple[str, int], Verdict]]:
    """Each completion is executed as soon as it is there, or with overlap=False when all are.
    Without an executor nothing is."""
    wanted = generator.wanted(problems, n_samples)
    by_id = {problem.task_id: problem for problem in problems}
    futures: dict[tuple[str, int], Future] = {}
    parts = {"generate": len(wanted), "execute": len(wanted) if executor else 0}
    with Progress(**parts) as progress:

        def take(sample: Sample) -> None:
            problem = by_id[sample.task_id]
            futures[sample.task_id, sample.sample] = submit(executor, problem, sample, progress)

        found = generator.run(
            wanted,
            slots,
            take if executor and overlap else lambda sample: None,
            lambda tokens, fresh: progress.step("generate", tokens, not fresh),
        )
        if executor and not overlap:
            for sample in found.samples:
                take(sample)
        return found, {name: future.result() for name, future in futures.items()}


def execute(
    problems: ProblemSet, found: Generations, executor: Executor
) -> dict[tuple[str, int], Verdict]:
    with Progress(execute=len(found.samples)) as progress:
        futures = {
            (s.task_id, s.sample): submit(executor, problems.by_id[s.task_id], s, progress)
            for s in found.samples
        }
        return {name: future.result() for name, future in futures.items()}


def submit(executor: Executor, problem: Problem, sample: Sample, progress: Progress) -> Future:
    if sample.finish_reason == TOO_LONG:
        future: Future = Future()
        future.set_result(Verdict(TOO_LONG))
    else:
        future = executor.submit(problem, problem.program(sample.output, bool(sample.chat)))
    skipped = future.done()
    future.add_done_callback(lambda _: progress.step("execute", skipped=skipped))
    return future


def look_up(
    problems: ProblemSet, found: Generations, output: Path
) -> dict[tuple[str, int], Verdict]:
    """The verdicts of an execute stage that has run. Raises EagleError for programs that have
    none.
    """
    rules = Rules(**read(output / EXECUTED, "execute")["rules"])
    known = known_verdicts(output)
    verdicts, missing = {}, []
    for s in found.samples:
        problem = problems.by_id[s.task_id]
        if s.finish_reason == TOO_LONG:
            verdicts[s.task_id, s.sample] = Verdict(TOO_LONG)
            continue
        program = problem.program(s.output, bool(s.chat))
        verdict = known.get(execution_key(problem, program, rules))
        if verdict is None:
            missing.append(f"{s.task_id}/{s.sample}")
        else:
            verdicts[s.task_id, s.sample] = verdict
    if missing:
        raise EagleError(
            f"{len(missing)} of {len(found.samples)} programs have no verdict in {output / JOURNAL} "
            f"({some(missing, 3)}); run the execute stage with this data and these generations"
        )
    return verdicts


def assemble(
    problems: ProblemSet,
    found: Generations,
    verdicts: Mapping[tuple[str, int], Verdict],
    ks: Sequence[int],
    checked: Checked | None,
    max_harness_errors: float,
) -> dict:
    """The whole report of one run."""
    statuses = {name: verdict.status for name, verdict in verdicts.items()}
    return {
        "data": dataset_facts(problems, checked),
        "generation": found.settings,
        "speed": found.speed(),
        "isolation": sorted({v.isolation for v in verdicts.values() if v.isolation}),
        **score(problems, statuses, found, ks, checked, max_harness_errors),
    }


def write(
    output: Path,
    problems: ProblemSet,
    found: Generations,
    report: dict,
    published: dict | None,
    suffix: str,
) -> None:
    """report{suffix}.json and .md, and upstream's generations{suffix}.json and
    metrics{suffix}.json.
    """
    if published:
        report["against"] = against(report, published)
    write_report(output, report, f"report{suffix}")
    write_upstream(output / f"generations{suffix}.json", problems.problems, found)
    if report["pass_at_k"]:
        write_metrics(output / f"metrics{suffix}.json", report)


def included(problems: ProblemSet, checked: Checked | None) -> list[Problem]:
    """The problems that are not excluded. Raises EagleError when all are."""
    excluded = checked.excluded_ids if checked else set()
    kept = [p for p in problems.problems if p.task_id not in excluded]
    if not kept:
        raise EagleError(
            f"all {len(problems.problems)} problems are excluded: none passes with its own solution, first "
            f"{checked.excluded[0]['task_id']}: {checked.excluded[0]['reason']}"
        )
    return kept


def keep_checked(output: Path, checked: Checked, tried: dict | None = None) -> None:
    keep(output / CHECKED, {**asdict(checked), "mutants": tried})


def read_checked(output: Path, problems: ProblemSet) -> Checked | None:
    """What verify-dataset found, where it has run on the same problems."""
    if not (output / CHECKED).exists():
        return None
    data = read(output / CHECKED, "verify-dataset")
    data.pop("mutants", None)
    checked = Checked(**data)
    return checked if checked.fingerprint == problems.fingerprint else None


def keep_execution(output: Path, rules: Rules, isolation: dict) -> None:
    """For the score stage, which has to know by which limits the programs were judged."""
    keep(output / EXECUTED, {"rules": asdict(rules), "isolation": isolation})


def keep(path: Path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def read(path: Path, stage: str) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise EagleError(f"there is no {path}; run the {stage} stage first") from error
    except ValueError as error:
        raise EagleError(f"{path} is damaged ({error}); run the {stage} stage again") from error
