"""Evaluate a model: programs that are run against tests, tasks with labels, texts with references.

    from end to end, on the shipped problems or yours:
    python -m inference.evaluate taco --allow_code_execution
    python -m inference.evaluate humaneval --data FILE --base PATH --allow_code_execution  # mbpp, infilling
    the stages on their own:
    python -m inference.evaluate generate --data FILE --base PATH --output DIR
    python -m inference.evaluate execute --data FILE --generations FILE --output DIR \\
        --allow_code_execution
    python -m inference.evaluate score --data FILE --generations FILE --output DIR
    python -m inference.evaluate verify-dataset --data FILE --allow_code_execution
    without running programs:
    python -m inference.evaluate tasks --data PREDICTIONS.jsonl
    python -m inference.evaluate text --data TEXTS.jsonl

What is made is kept in --output as soon as it is there; the same command goes on where it was
stopped.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from configs import cli
from eagle.errors import EagleError
from eagle.files import atomic_write_text
from inference.evaluation import executing, flags, metrics, report, scores
from inference.evaluation.generations import read_generations, write_upstream


@flags.command(flags.Whole)
def code(asked: flags.Whole) -> int:
    """Generate programs, run them against the problems' tests while others are generated, and score
    them.

    --data: a data file, a folder of them or a hub data set, in TACO's, HumanEval's (for infilling
    with a suffix) or MBPP's schema; without it, the shipped problems. Without --base the embedded
    model. --limit N takes the first problems.

    Each problem gets --n_samples programs; --k 1,5,10 are those of pass@k (by default as many of
    these as n_samples allows). A sample's seed depends on --seed, the problem and its number only,
    so neither --slots nor the other problems change it. --engine eagle drafts, vanilla does not;
    auto drafts where there is a head. --compare generates with both, one after the other and
    without executing meanwhile, and sets them side by side.

    Programs are run confined (--isolation auto, namespaces or rlimits), and only with
    --allow_code_execution. Reference solutions are run first (--noverify leaves that out): a
    problem whose own solution fails is excluded and listed. --seconds (CPU time a test) and
    --memory_mb replace the problems' own limits. --checkers FILE.py judges problems of several
    right answers.

    In --output: report.json and report.md, generations.json and metrics.json (upstream's formats),
    dataset.json (what verification found), and the journals from which a stopped run goes on."""
    ks, problems = asked.ks(asked.n_samples), asked.problems()
    out, checked, made, reports = asked.folder(), None, {}, {}
    with asked.executor(out) as executor:
        if asked.verify:
            checked = executing.verify(problems, executor, out)
        kept = executing.verified(problems, checked)
        for generator in asked.generators(out, asked.compare):
            engine = generator.sampling.engine
            make = partial(generator.run, kept, asked.n_samples, asked.slots)
            if asked.compare:  # about speed too: nothing else runs while it generates
                found = make()
                executor.run_all(executing.programs_of(problems, found.samples), "executed")
            else:
                found = executing.generate_and_execute(make, problems, executor)
            verdicts = executing.verdicts_of(problems, found, executor.rules, executor.verdicts)
            made[engine] = found
            reports[engine] = scores.assemble(
                problems, found, verdicts, ks, checked, asked.max_harness_errors
            )
            suffix = f"-{engine}" if asked.compare else ""
            report.write(out, reports[engine], suffix)
            write_upstream(out / f"generations{suffix}.json", kept, found)
        executing.keep_execution(out, executor)
    if not asked.compare:
        return finish(out, reports[engine])
    result = scores.compare(problems, made, reports)
    page = report.side_by_side(result)
    atomic_write_text(out / "compare.md", page)
    print(page)
    emit(result, out / "compare.json")
    return int(not result["agree"])


@flags.command(flags.Output, flags.Drawing, flags.Data)
def generate(asked) -> None:
    """Only generate: the journal generations-FINGERPRINT.jsonl, and generations.json in upstream's
    format."""
    problems, out = asked.problems().problems, asked.folder()
    [generator] = asked.generators(out)
    found = generator.run(problems, asked.n_samples, asked.slots)
    write_upstream(out / "generations.json", problems, found)
    facts = {"generations": str(generator.path), "settings": found.settings}
    print(json.dumps({**facts, **found.speed()}))


@flags.command(flags.Output, flags.Running, flags.Given)
def execute(asked) -> None:
    """Only run the programs of --generations (ours, .jsonl, or upstream's, .json); verdicts go to
    --output."""
    problems, out = asked.problems(), asked.folder()
    found = read_generations(asked.generations, problems)
    with asked.executor(out) as executor:
        executor.run_all(executing.programs_of(problems, found.samples), "executed")
        executing.keep_execution(out, executor)
    verdicts = executing.verdicts_of(problems, found, executor.rules, executor.verdicts)
    causes = Counter(verdict.status for verdict in verdicts.values())
    facts = {"programs": len(verdicts), "causes": dict(causes), "isolation": executor.sandbox.level}
    print(json.dumps(facts))


@flags.command(flags.Output, flags.Scoring, flags.Given)
def score(asked) -> int:
    """Only score what the execute stage found out about --generations in --output; writes the
    reports there.

    Where verify-dataset has run on the same problems with the same --output, its exclusions count.
    """
    problems, out = asked.problems(), Path(asked.output)
    found = read_generations(asked.generations, problems)
    verdicts = executing.look_up(problems, found, out)
    checked = executing.read_checked(out, problems)
    ks = asked.ks(min(map(len, found.by_task().values())))
    limit = asked.max_harness_errors
    return finish(out, scores.assemble(problems, found, verdicts, ks, checked, limit))


@flags.command(flags.Output, flags.Running, flags.Data)
def verify_dataset(asked) -> int:
    """Run the reference solutions: problems whose own solution fails are listed, and excluded by
    later stages. The exit status is 1 when there is one."""
    problems, out = asked.problems(), asked.folder()
    with asked.executor(out) as executor:
        checked = executing.verify(problems, executor, out)
    summary = {
        "problems": len(problems.problems),
        "verified": len(checked["verified"]),
        "excluded": checked["excluded"],
        "unverified": len(checked["unverified"]),
        "malformed": problems.bad,
        "isolation": checked["isolation"],
    }
    print(json.dumps(summary))
    return int(bool(checked["excluded"]))


@flags.command(flags.Rows)
def tasks(asked: flags.Rows) -> None:
    """Metrics of tasks from predictions and labels; --output FILE.json keeps them.

    A line of --data: {"task", "type", "prediction", "label"}, type classification, regression,
    ranking (lists of numbers) or generation. A prediction of null is one that could not be read.
    "scores": {label: number} of a classification gives AUROC."""
    answers, bad = asked.read(metrics.ANSWER.validate_python)
    result = {**metrics.task_report(answers), "bad_rows": bad}
    for name, entry in result["tasks"].items():
        shown = ", ".join(f"{k} {v:.4f}" for k, v in entry.items() if isinstance(v, float))
        counts = f"{entry['rows']} rows, {entry['unanswered']} unanswered"
        print(f"{name} ({entry['type']}, {counts}): {shown}")
    emit(result, asked.output)


@flags.command(flags.Texts)
def text(asked: flags.Texts) -> None:
    """Metrics of texts: ROUGE-L, chrF and exact match where all have references, repetition of
    n-grams, and with --perplexity what --base thinks of them. --output FILE.json keeps them.

    A line of --data: {"prediction" or "completion", "reference"?, "context"?}."""
    rows, bad = asked.read(metrics.Text.model_validate)
    predictions = [row.prediction for row in rows]
    references = [row.reference for row in rows]
    result: dict = {"texts": len(rows), "bad_rows": bad}
    if None not in references:
        result |= metrics.with_references(predictions, references)
    elif without := references.count(None) % len(rows):
        raise EagleError(
            f"{without} of {len(rows)} texts of {asked.data} have no reference; give one to all "
            "or none"
        )
    result["repetition"] = metrics.repetition(predictions)
    if asked.perplexity:
        contexts = [row.context or "" for row in rows]
        result |= metrics.perplexity(asked.load(), predictions, contexts)
    emit(result, asked.output)


def finish(out: Path, found: dict) -> int:
    """Writes the report, prints the page, then one line of JSON. A refused score is a failure."""
    report.write(out, found)
    print((out / "report.md").read_text("utf-8"))
    names = ("pass_at_k", "refused", "causes", "harness_errors", "isolation", "speed")
    print(json.dumps({name: found[name] for name in names}))
    return int(found["refused"] is not None)


def emit(result: dict, output: str | Path | None) -> None:
    if output is not None:
        atomic_write_text(output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


COMMANDS = dict.fromkeys(("taco", "humaneval", "mbpp", "infilling"), code)
COMMANDS |= {"generate": generate, "execute": execute, "score": score}
COMMANDS |= {"verify-dataset": verify_dataset, "tasks": tasks, "text": text}


if __name__ == "__main__":
    if hasattr(sys, "set_int_max_str_digits"):  # tests of big numbers have longer ones
        sys.set_int_max_str_digits(0)
    try:
        cli.choose(COMMANDS, __doc__, "python -m inference.evaluate")
    except OSError as error:  # a full disk, most likely
        sys.exit(
            f"error: {error.filename or 'a file'}: {error.strerror}; completions and verdicts so "
            "far are kept: repair it and run the same command again"
        )
