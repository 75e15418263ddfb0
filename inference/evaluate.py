"""Evaluate a model: programs that are run against tests, tasks with labels, texts with references.

    from end to end, on the shipped problems or yours:
    python -m inference.evaluate taco --allow_code_execution
    python -m inference.evaluate humaneval --data FILE --base PATH --allow_code_execution  # or mbpp
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
from inference.evaluation import comparing, report, run, task_metrics, text_metrics
from inference.evaluation.executing import Executor
from inference.evaluation.flags import (
    Data,
    Drawing,
    Flags,
    Model,
    Output,
    Running,
    Scoring,
    command,
)
from inference.evaluation.generations import read_generations, write_upstream
from inference.evaluation.rows import read_rows


class Code(Output, Scoring, Running, Drawing, Data):
    verify: bool = True
    compare: bool = False


@command
def code(flags: Code) -> int:
    """Generate programs, run them against the problems' tests while others are generated, and score
    them.

    --data: a local .jsonl, .json or .parquet file, or a folder of them, in TACO's, HumanEval's or
    MBPP's schema; without it, the shipped problems. Without --base the embedded model.
    --difficulties EASY,MEDIUM, --skills "Sorting,Range queries" and --limit N choose problems.

    Each problem gets --n_samples programs; --k 1,5,10 are those of pass@k (by default as many of
    these as n_samples allows). A sample's seed depends on --seed, the problem and its number only,
    so neither --slots nor the other problems change it. --engine eagle drafts, vanilla does not;
    auto drafts where there is a head. --compare generates with both, one after the other and
    without executing meanwhile, and sets them side by side.

    Programs are run confined (--isolation auto, namespaces or rlimits), and only with
    --allow_code_execution. Reference solutions are run first (--noverify leaves that out): a
    problem whose own solution fails is excluded and listed. --seconds (CPU time a test) and
    --memory_mb replace the problems' own limits, --policy their own comparison. --checkers FILE.py
    judges problems of several right answers. --against FILE sets the scores beside those of an
    upstream metrics file.

    In --output: report.json and report.md, generations.json and metrics.json (upstream's formats),
    dataset.json (what verification found), and the journals from which a stopped run goes on."""
    from inference.evaluation.generating import Generator
    from inference.generate import prepare

    ks, published, problems = flags.ks(flags.n_samples), flags.published(), flags.problems()
    out, checked, made, reports = flags.folder(), None, {}, {}
    with flags.sandbox() as sandbox, Executor(sandbox, out, flags.rules) as executor:
        if flags.verify:
            checked = run.verify(problems, executor, out)
            say_checked(checked)
        kept = checked.keeps(problems) if checked else problems.problems
        model = flags.load()
        engines = ("vanilla", "eagle") if flags.compare else (flags.engine_of(model),)
        for generator in [Generator(model, flags.sampling(engine), out) for engine in engines]:
            engine = generator.sampling.engine
            prepare(model, engine)
            make = partial(generator.run, kept, flags.n_samples, flags.slots)
            # a comparison is about speed too: nothing else runs while it generates
            found = run.generate_and_execute(make, problems, executor, not flags.compare)
            verdicts = run.verdicts_of(problems, found, executor.rules, executor.verdicts)
            made[engine] = found
            reports[engine] = report.assemble(
                problems, found, verdicts, ks, checked, flags.max_harness_errors, published
            )
            suffix = f"-{engine}" if flags.compare else ""
            report.write(out, reports[engine], suffix)
            write_upstream(out / f"generations{suffix}.json", kept, found)
        run.keep_execution(out, executor)
    if not flags.compare:
        return finish(out, reports[engine])
    result = comparing.compare(problems, made, reports)
    page = comparing.markdown(result)
    atomic_write_text(out / "compare.md", page)
    print(page)
    emit(result, out / "compare.json")
    return int(not result["agree"])


class Generate(Output, Drawing, Data):
    pass


@command
def generate(flags: Generate) -> None:
    """Only generate: the journal generations-FINGERPRINT.jsonl, and generations.json in upstream's
    format."""
    from inference.evaluation.generating import Generator
    from inference.generate import prepare

    problems, out = flags.problems().problems, flags.folder()
    model = flags.load()
    engine = flags.engine_of(model)
    prepare(model, engine)
    generator = Generator(model, flags.sampling(engine), out)
    found = generator.run(problems, flags.n_samples, flags.slots)
    write_upstream(out / "generations.json", problems, found)
    facts = {"generations": str(generator.path), "settings": found.settings}
    print(json.dumps({**facts, **found.speed()}))


class Execute(Output, Running, Data):
    generations: str


@command
def execute(flags: Execute) -> None:
    """Only run the programs of --generations (ours, .jsonl, or upstream's, .json); verdicts go to
    --output."""
    problems, out = flags.problems(), flags.folder()
    found = read_generations(flags.generations, problems)
    with flags.sandbox() as sandbox, Executor(sandbox, out, flags.rules) as executor:
        run.execute(problems, found, executor)
        run.keep_execution(out, executor)
    verdicts = run.verdicts_of(problems, found, executor.rules, executor.verdicts)
    causes = Counter(verdict.status for verdict in verdicts.values())
    facts = {"programs": len(verdicts), "causes": dict(causes), "isolation": sandbox.level}
    print(json.dumps(facts))


class Score(Output, Scoring, Data):
    generations: str


@command
def score(flags: Score) -> int:
    """Only score what the execute stage found out about --generations in --output; writes the
    reports there.

    Where verify-dataset has run on the same problems with the same --output, its exclusions count.
    """
    problems, published, out = flags.problems(), flags.published(), Path(flags.output)
    found = read_generations(flags.generations, problems)
    verdicts = run.look_up(problems, found, out)
    checked = run.read_checked(out, problems)
    ks = flags.ks(min(map(len, found.by_task().values())))
    made = report.assemble(
        problems, found, verdicts, ks, checked, flags.max_harness_errors, published
    )
    report.write(out, made)
    return finish(out, made)


class Verify(Output, Running, Data):
    pass


@command
def verify_dataset(flags: Verify) -> int:
    """Run the reference solutions: problems whose own solution fails are listed, and excluded by
    later stages. The exit status is 1 when there is one."""
    problems, out = flags.problems(), flags.folder()
    with flags.sandbox() as sandbox, Executor(sandbox, out, flags.rules) as executor:
        checked = run.verify(problems, executor, out)
    say_checked(checked)
    summary = {
        "problems": len(problems.problems),
        "verified": len(checked.verified),
        "excluded": checked.excluded,
        "unverified": len(checked.unverified),
        "malformed": problems.bad,
        "isolation": checked.isolation,
    }
    print(json.dumps(summary))
    return int(bool(checked.excluded))


class Rows(Flags):
    data: str
    output: str | None = None
    max_bad_fraction: float = 0.0


@command
def tasks(flags: Rows) -> None:
    """Metrics of tasks from predictions and labels; --output FILE.json keeps them.

    A line of --data: {"task", "type", "prediction", "label"}, type classification, regression,
    ranking (lists of numbers) or generation. A prediction of null is one that could not be read.
    "scores": {label: number} of a classification gives AUROC."""
    answers, bad = read_rows(flags.data, task_metrics.read_answer, flags.max_bad_fraction)
    result = {**task_metrics.task_report(answers), "bad_rows": bad}
    for name, entry in result["tasks"].items():
        shown = ", ".join(f"{k} {v:.4f}" for k, v in entry.items() if isinstance(v, float))
        counts = f"{entry['rows']} rows, {entry['unanswered']} unanswered"
        print(f"{name} ({entry['type']}, {counts}): {shown}")
    emit(result, flags.output)


class Texts(Rows, Model):
    perplexity: bool = False


@command
def text(flags: Texts) -> None:
    """Metrics of texts: ROUGE-L, chrF and exact match where all have references, repetition of
    n-grams, and with --perplexity what --base thinks of them. --output FILE.json keeps them.

    A line of --data: {"prediction" or "completion", "reference"?, "context"?}."""
    rows, bad = read_rows(flags.data, text_metrics.read_text, flags.max_bad_fraction)
    predictions = [row.prediction for row in rows]
    references = [row.reference for row in rows]
    result: dict = {"texts": len(rows), "bad_rows": bad}
    if None not in references:
        result |= text_metrics.with_references(predictions, references)
    elif any(reference is not None for reference in references):
        raise EagleError(
            f"{references.count(None)} of {len(rows)} texts of {flags.data} have no reference; "
            "give one to all or none"
        )
    result["repetition"] = text_metrics.repetition(predictions)
    if flags.perplexity:
        contexts = [row.context or "" for row in rows]
        result |= text_metrics.perplexity(flags.load(), predictions, contexts)
    emit(result, flags.output)


def say_checked(checked: report.Checked) -> None:
    for row in checked.excluded:
        print(f"excluded: {row['task_id']}: {row['reason']}", file=sys.stderr)
    total = len(checked.verified) + len(checked.excluded)
    said = f"{len(checked.verified)} of {total} problems pass with their own solution"
    print(f"{said}; isolation: {checked.isolation}", file=sys.stderr)


def finish(out: Path, found: dict) -> int:
    """Prints the page, then one line of JSON. A refused score is a failure."""
    print((out / "report.md").read_text("utf-8"))
    names = ("pass_at_k", "refused", "causes", "harness_errors", "isolation", "speed")
    print(json.dumps({name: found[name] for name in names}))
    return int(found["refused"] is not None)


def emit(result: dict, output: str | Path | None) -> None:
    if output is not None:
        atomic_write_text(output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


COMMANDS = {
    "taco": code,
    "humaneval": code,
    "mbpp": code,
    "generate": generate,
    "execute": execute,
    "score": score,
    "verify-dataset": verify_dataset,
    "tasks": tasks,
    "text": text,
}


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else None
    if name not in COMMANDS:
        if name in ("-h", "--help"):
            print(__doc__)
            sys.exit(0)
        known = ", ".join(COMMANDS)
        sys.exit(f"error: {f'unknown command {name!r}' if name else 'name a command'}: {known}")
    if hasattr(sys, "set_int_max_str_digits"):
        # tests of big numbers have longer ones than Python reads by default
        sys.set_int_max_str_digits(0)
    preset = ["--format", name] if COMMANDS[name] is code else []
    prog = f"python -m inference.evaluate {name}"
    try:
        cli.main(COMMANDS[name], [*preset, *arguments[1:]], name=prog)
    except OSError as error:  # a full disk, most likely
        sys.exit(
            f"error: {error.filename or 'a file'}: {error.strerror}; completions and verdicts so "
            "far are kept: repair it and run the same command again"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
