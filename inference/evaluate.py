"""Evaluate a model: programs that are run against tests, tasks with labels, texts with references.

    python -m inference.evaluate taco --allow_code_execution             # the shipped problems,
    from end to end python -m inference.evaluate humaneval --data FILE --base PATH
    --allow_code_execution      # also mbpp python -m inference.evaluate generate --data FILE --base
    PATH --output DIR      # the stages on their own python -m inference.evaluate execute --data
    FILE --generations FILE --output DIR --allow_code_execution python -m inference.evaluate score
    --data FILE --generations FILE --output DIR python -m inference.evaluate verify-dataset --data
    FILE --allow_code_execution python -m inference.evaluate tasks --data PREDICTIONS.jsonl python
    -m inference.evaluate text --data TEXTS.jsonl python -m inference.evaluate bench

What is made is kept in --output as soon as it is there; the same command goes on where it was
stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from configs import cli
from inference.evaluation.flags import (
    Data,
    Drawing,
    Model,
    Running,
    Scoring,
    at_least,
    command,
    folder,
    need,
)


@command
def code(
    data: Data,
    model: Model,
    drawing: Drawing,
    running: Running,
    scoring: Scoring,
    *,
    verify: bool = True,
    compare: bool = False,
    output: str = "runs/evaluate",
) -> int:
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
    dataset.json (what verification found), and the journals from which a stopped run goes on.
    """
    from eagle.errors import EagleError
    from inference.evaluation import comparing, run
    from inference.evaluation.executing import Executor
    from inference.evaluation.generating import Generator
    from inference.generate import prepare

    problems, ks, published = data.load(), scoring.ks(drawing.n_samples), scoring.published
    out = folder(output)
    with running.sandbox() as sandbox, Executor(sandbox, out, running.rules) as executor:
        checked = None
        if verify:
            checked = run.verify(problems, executor)
            run.keep_checked(out, checked)
            say_checked(checked)
        kept = run.included(problems, checked)
        loaded = model.load()
        if compare and loaded.drafter is None:
            raise EagleError(
                "there is no draft head to compare with plain decoding: give --head PATH"
            )
        reports, made = {}, {}
        for engine in ("vanilla", "eagle") if compare else (model.engine_of(loaded),):
            prepare(loaded, engine)
            generator = Generator(loaded, drawing.sampling(engine, model), out)
            # a comparison is about speed too: nothing else runs while it generates
            made[engine], verdicts = run.generate_and_execute(
                generator, kept, drawing.n_samples, drawing.slots, executor, overlap=not compare
            )
            reports[engine] = run.assemble(
                problems, made[engine], verdicts, ks, checked, scoring.max_harness_errors
            )
            suffix = f"-{engine}" if compare else ""
            run.write(out, problems, made[engine], reports[engine], published, suffix)
        run.keep_execution(out, running.rules, sandbox.isolation)
    if not compare:
        return finish(out, reports[engine])
    result = comparing.compare(problems, made, reports)
    comparing.write(out, result)
    print((out / "compare.md").read_text("utf-8"))
    print(json.dumps({k: v for k, v in result.items() if k != "differ"}))
    return int(not result["agree"])


@command
def generate(data: Data, model: Model, drawing: Drawing, *, output: str = "runs/evaluate") -> None:
    """Only generate: the journal generations-FINGERPRINT.jsonl, and generations.json in upstream's
    format.
    """
    from inference.evaluation import run
    from inference.evaluation.generating import Generator
    from inference.evaluation.generations import write_upstream
    from inference.generate import prepare

    problems, out = data.load(), folder(output)
    loaded = model.load()
    engine = model.engine_of(loaded)
    prepare(loaded, engine)
    generator = Generator(loaded, drawing.sampling(engine, model), out)
    found, _ = run.generate_and_execute(
        generator, problems.problems, drawing.n_samples, drawing.slots, None
    )
    write_upstream(out / "generations.json", problems.problems, found)
    print(
        json.dumps(
            {"generations": str(generator.path), "settings": found.settings, **found.speed()}
        )
    )


@command
def execute(
    data: Data, running: Running, *, generations: str | None = None, output: str = "runs/evaluate"
) -> None:
    """Only run the programs of --generations (ours, .jsonl, or upstream's, .json); verdicts go to
    --output.
    """
    from collections import Counter

    from inference.evaluation import run
    from inference.evaluation.executing import Executor
    from inference.evaluation.generations import read_generations

    need(generations=generations)
    problems, out = data.load(), folder(output)
    found = read_generations(generations, problems)
    with running.sandbox() as sandbox, Executor(sandbox, out, running.rules) as executor:
        verdicts = run.execute(problems, found, executor)
        run.keep_execution(out, running.rules, sandbox.isolation)
    causes = Counter(verdict.status for verdict in verdicts.values())
    print(
        json.dumps({"programs": len(verdicts), "causes": dict(causes), "isolation": sandbox.level})
    )


@command
def score(
    data: Data, scoring: Scoring, *, generations: str | None = None, output: str = "runs/evaluate"
) -> int:
    """Only score what the execute stage found out about --generations in --output; writes the
    reports there.

    Where verify-dataset has run on the same problems with the same --output, its exclusions count.
    """
    from inference.evaluation import run
    from inference.evaluation.generations import read_generations

    need(generations=generations)
    problems, published, out = data.load(), scoring.published, Path(output)
    found = read_generations(generations, problems)
    verdicts = run.look_up(problems, found, out)
    checked = run.read_checked(out, problems)
    ks = scoring.ks(min((len(s) for s in found.by_task().values()), default=0))
    report = run.assemble(problems, found, verdicts, ks, checked, scoring.max_harness_errors)
    run.write(out, problems, found, report, published, "")
    return finish(out, report)


@command
def verify_dataset(
    data: Data, running: Running, *, mutants: int = 0, output: str = "runs/evaluate"
) -> int:
    """Run the reference solutions: problems whose own solution fails are listed, and excluded by
    later stages.

    --mutants N also runs up to N programs a problem that are its solution with one mistake put in:
    the share that passes says how much the tests overlook. The exit status is 1 when a problem is
    excluded or a mutant passes.
    """
    from inference.evaluation import run
    from inference.evaluation.executing import Executor

    at_least(0, mutants=mutants)
    problems, out = data.load(), folder(output)
    with running.sandbox() as sandbox, Executor(sandbox, out, running.rules) as executor:
        checked = run.verify(problems, executor)
        tried = run.try_mutants(problems, checked, executor, mutants) if mutants else None
        run.keep_checked(out, checked, tried)
    say_checked(checked)
    summary = {
        "problems": len(problems.problems),
        "verified": len(checked.verified),
        "excluded": checked.excluded,
        "unverified": len(checked.unverified),
        "malformed": problems.bad,
        "isolation": checked.isolation,
    }
    if tried:
        summary |= {"mutants": tried["mutants"], "mutants_accepted": tried["accepted"]}
        for row in tried["survivors"]:
            print(f"a mutant of {row['task_id']} passes:\n{row['code']}", file=sys.stderr)
    print(json.dumps(summary))
    return int(bool(checked.excluded or tried and tried["accepted"]))


def tasks(
    *, data: str | None = None, output: str | None = None, max_bad_fraction: float = 0.0
) -> None:
    """Metrics of tasks from predictions and labels; --output FILE.json keeps them.

    A line of --data: {"task", "type", "prediction", "label"}, type classification, regression,
    ranking (lists of numbers) or generation. A prediction of null is one that could not be read.
    "scores": {label: number} of a classification gives AUROC.
    """
    from inference.evaluation.task_metrics import read_answer, task_report

    need(data=data)
    answers, bad = read_all(data, read_answer, max_bad_fraction)
    result = {**task_report(answers), "bad_rows": bad}
    for name, entry in result["tasks"].items():
        shown = ", ".join(f"{k} {v:.4f}" for k, v in entry.items() if isinstance(v, float))
        print(
            f"{name} ({entry['type']}, {entry['rows']} rows, {entry['unanswered']} unanswered): {shown}"
        )
    emit(result, output)


@command
def text(
    model: Model,
    *,
    data: str | None = None,
    perplexity: bool = False,
    output: str | None = None,
    max_bad_fraction: float = 0.0,
) -> None:
    """Metrics of texts: ROUGE-L, chrF and exact match where all have references, repetition of
    n-grams, and with --perplexity what --base thinks of them. --output FILE.json keeps them.

    A line of --data: {"prediction" or "completion", "reference"?, "context"?}.
    """
    from inference.evaluation import text_metrics

    need(data=data)
    rows, bad = read_all(data, read_text, max_bad_fraction)
    predictions = [row["prediction"] for row in rows]
    result: dict = {"texts": len(rows), "bad_rows": bad}
    with_reference = [row["reference"] is not None for row in rows]
    if all(with_reference):
        references = [row["reference"] for row in rows]
        result |= text_metrics.with_references(predictions, references)
    elif any(with_reference):
        from eagle.errors import EagleError

        raise EagleError(
            f"{with_reference.count(False)} of {len(rows)} texts of {data} have no reference; give one to all or none"
        )
    result["repetition"] = text_metrics.repetition(predictions)
    if perplexity:
        contexts = [row["context"] for row in rows]
        result |= text_metrics.perplexity(model.load(), predictions, contexts)
    emit(result, output)


@command
def bench(
    model: Model,
    *,
    num_problems: int = 8,
    n_samples: int = 4,
    max_new_tokens: int = 64,
    temperature: float = 0.2,
    slots: int = 16,
    repeats: int = 2,
    output: str | None = None,
) -> None:
    """Samples per second of generation over slots, as evaluation does it, against one sample at a
    time without drafting. The last line is one JSON object; --output FILE.json keeps it."""
    from inference.evaluation.generations import Sampling
    from inference.evaluation.problems import load_problems
    from inference.evaluation.throughput import measure

    at_least(1, num_problems=num_problems, n_samples=n_samples, slots=slots, repeats=repeats)
    problems = load_problems(None, limit=num_problems).problems
    sampling = Sampling(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        tree=model.tree,
        compile=model.compile,
    )
    emit(measure(model.load(), problems, sampling, n_samples, slots, repeats), output)


def say_checked(checked) -> None:
    for row in checked.excluded:
        print(f"excluded: {row['task_id']}: {row['reason']}", file=sys.stderr)
    total = len(checked.verified) + len(checked.excluded)
    print(
        f"{len(checked.verified)} of {total} problems pass with their own solution; isolation: {checked.isolation}",
        file=sys.stderr,
    )


def finish(out: Path, report: dict) -> int:
    """Prints the page, then one line of JSON. A refused score is a failure."""
    print((out / "report.md").read_text("utf-8"))
    names = ("pass_at_k", "refused", "causes", "harness_errors", "isolation", "speed")
    print(json.dumps({name: report[name] for name in names}))
    return int(report["refused"] is not None)


def read_all(path: str, reader, max_bad_fraction: float) -> tuple[list, list[dict]]:
    """Rows of a file through `reader`, and those that it refused with a ValueError."""
    from eagle.errors import EagleError
    from inference.evaluation.rows import read_rows

    rows, bad = [], []
    for where, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            rows.append(reader(row))
        except ValueError as error:
            bad.append({"row": where, "reason": str(error)})
    if len(bad) > max_bad_fraction * (len(rows) + len(bad)):
        raise EagleError(
            f"{len(bad)} of {len(rows) + len(bad)} rows cannot be used, first {bad[0]['row']}: {bad[0]['reason']}; "
            f"repair them, or raise --max_bad_fraction (now {max_bad_fraction:g})"
        )
    if not rows:
        raise EagleError(f"{path} has no rows; one JSON object a line")
    return rows, bad


def read_text(row: object) -> dict:
    if not isinstance(row, dict):
        raise ValueError("must be an object with a prediction")
    prediction = row.get("prediction", row.get("completion"))
    found = {
        "prediction": prediction,
        "reference": row.get("reference"),
        "context": row.get("context") or "",
    }
    if not isinstance(prediction, str):
        raise ValueError("has no prediction or completion")
    if not isinstance(found["context"], str) or not isinstance(
        found["reference"], (str, type(None))
    ):
        raise ValueError("reference and context must be text")
    return found


def emit(result: dict, output: str | None) -> None:
    if output is not None:
        from inference.generate import write_text

        write_text(Path(output), json.dumps(result, indent=2) + "\n")
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
    "bench": bench,
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
        sys.set_int_max_str_digits(
            0
        )  # tests of big numbers have longer ones than Python reads by default
    preset = ["--format", name] if COMMANDS[name] is code else []
    try:
        cli.main(
            COMMANDS[name], [*preset, *arguments[1:]], name=f"python -m inference.evaluate {name}"
        )
    except OSError as error:  # a full disk, most likely
        sys.exit(
            f"error: {error.filename or 'a file'}: {error.strerror}; completions and verdicts so far are kept: "
            "repair it and run the same command again"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
