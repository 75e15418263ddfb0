"""Answers written anew, record by record, into a file that a kill can only delay.

    ANSWERS.journal            answers as they come, while the work goes on
    ANSWERS.jsonl              in the end: records in the order of the input, answers replaced
    ANSWERS.quarantine.jsonl   records that got no answer, with the reason
    ANSWERS.card.json          who wrote the answers and how

Work goes by blocks, which bound the memory. Started again, it takes what the journal holds and asks
for the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema import DataConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import Meter
from records import shipped
from records.card import BY_TARGET, QUARANTINE, at_endpoint, card_path, file_hash, read_card
from records.quarantine import BadRow, diagnose, object_of, write_quarantine
from records.render import record_key
from records.rows import RowError
from records.sources import Record, read_records, resolve
from train.prepare.answering import Endpoint, Local, Request
from train.prepare.records import Answer, Rewriter, Task

FORMATS = ("chat", "instruction", "fim", "tokenized")
HOPELESS = 16  # records that fail before any succeeds: the run stops
COUNTS = ("records", "written", "failed", "answers", "tokens", "cut_at_max_new_tokens")
SHAPING = {  # settings that prompts depend on
    "instruction": ("instruction_template",),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "seed"),
}
Key = tuple[int, int, int]  # of an answer: number of the record, part of it, turn


def find_files(cfg: DataConfig) -> list[Path]:
    """`data.path`, or the shipped file of the format."""
    if cfg.format not in FORMATS:
        use = ", ".join(FORMATS)
        raise EagleError(f"data.format={cfg.format} has no answers to write: use {use}")
    found = resolve(cfg.paths) if cfg.paths else [shipped(cfg.format)]
    if found == [None]:
        raise EagleError(f"no {cfg.format} data set is shipped: give data.path (--data FILE)")
    return found


def regenerate(
    cfg: DataConfig,
    files: list[Path],
    output: Path,
    engine: Local | Endpoint,
    limit: int | None = None,
    quiet: bool = False,
) -> dict:
    """Write `output`, or go on with it; returns its card. Output depends on the records, the
    sampling and its seed; in bf16 and fp16 near ties also on how many rows run together."""
    rewriter = Rewriter(cfg, engine.tokenizer, engine.eos)
    identity = identity_of(cfg, files, engine, limit)
    card = finished(output, identity)
    if card is not None:
        return card

    def read_all() -> Iterator[Record]:
        return itertools.islice(itertools.chain.from_iterable(map(read_records, files)), limit)

    total = sum(1 for _ in read_all())
    if not total:
        raise EagleError(f"{files[0]} holds no record; put at least one row into it (--data)")
    started, counts, bad = now(), Counter(dict.fromkeys(COUNTS, 0)), []
    part, quarantine = output.with_name(f".{output.name}.part"), quarantine_path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            closing(Journal(output, identity)) as journal,
            Meter("answers", total, done=len(journal.records), quiet=quiet) as meter,
            part.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            records = enumerate(read_all())
            while block := list(itertools.islice(records, engine.block)):
                tasks = []
                for number, record in block:
                    try:
                        parts = enumerate(rewriter.steps(object_of(record)))
                        tasks += [Task(record, number, part, steps) for part, steps in parts]
                    except RowError as error:
                        bad.append(BadRow.of(record, error))
                answer(tasks, engine, rewriter.ends, journal, meter)
                file.writelines(results(tasks, rewriter, counts, bad))
                counts["records"] += len(block)
                if len(bad) >= HOPELESS and not counts["written"]:
                    reasons = diagnose(bad)
                    raise EagleError(f"the first {len(bad)} records got no answer: {reasons}")
            file.flush()
            os.fsync(file.fileno())
        counts["failed"] = len(bad)
        write_quarantine(bad, quarantine)
        if not counts["written"]:
            raise EagleError(f"none of {total} records got an answer; see {quarantine}")
        os.replace(part, output)
        writer = identity["target"]
        card = {
            "card": 1,
            "file": output.name,
            "answers": BY_TARGET if writer["fingerprint"] else at_endpoint(writer["id"]),
            "policy": "on",
            **identity,
            **engine.notes,
            "counts": dict(counts),
            "started": started,
            "finished": now(),
            "complete": True,
            "sha256": file_hash(output),
        }
        atomic_write_text(card_path(output), json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        journal.path.unlink()
    except OSError as error:
        text = f"cannot write {error.filename or output}: {error.strerror}"
        remedy = "make room, and run the same command again to go on"
        raise EagleError(f"{text}; {remedy}") from error
    return card


def identity_of(
    cfg: DataConfig, files: list[Path], engine: Local | Endpoint, limit: int | None
) -> dict:
    """What the answers depend on."""
    source = {"files": [p.name for p in files], "sha256": [file_hash(p) for p in files]}
    identity = {
        "format": cfg.format,
        **engine.who,
        "sampling": asdict(engine.sampling),
        "source": source,
        "settings": {name: getattr(cfg, name) for name in SHAPING.get(cfg.format, ())},
        "limit": limit,
    }
    return json.loads(json.dumps(identity))


def finished(output: Path, identity: dict) -> dict | None:
    """The card of an output that is done. Refuses to write over anything else."""
    if output.suffix.lower() != ".jsonl":
        raise EagleError(f"--output {output}: answers are JSON lines, name a .jsonl file")
    card = read_card(output) if output.exists() else None
    if card is not None:
        require_same(output, card, identity)
    elif output.exists() and not output.with_suffix(".journal").exists():
        name = card_path(output).name
        raise EagleError(f"{output} exists and {name} is not its card; choose another --output")
    return card


def require_same(output: Path, begun: dict, identity: dict) -> None:
    for key, value in identity.items():
        if begun.get(key) != value:
            had, has = (json.dumps(v, ensure_ascii=False)[:120] for v in (begun.get(key), value))
            text = f"{output} was begun with {key}={had}, this command has {has}"
            remedy = "run the same command to go on, or choose another --output"
            raise EagleError(f"{text}; {remedy}")


def quarantine_path(output: Path) -> Path:
    return output.with_name(output.stem + QUARANTINE)


class Journal:
    """Answers as they came, a line each, after a line that says what they belong to. records: the
    numbers of those that an earlier start got an answer for."""

    def __init__(self, output: Path, identity: dict) -> None:
        self.path, self.places = output.with_suffix(".journal"), {}
        self.file = open(self.path, "ab+")
        self.close = self.file.close
        self.file.seek(0)
        place = 0
        for line in self.file:
            if not line.endswith(b"\n"):  # a kill has cut it
                break
            value = json.loads(line)
            if place == 0:
                require_same(output, value, identity)
            else:
                self.places[tuple(value[0])] = place
            place += len(line)
        self.file.truncate(place)
        if place == 0:
            self._append(identity)
        self.records = {number for number, _, _ in self.places}

    def known(self, key: Key) -> Answer | None:
        if key not in self.places:
            return None
        self.file.seek(self.places[key])
        return Answer(**json.loads(self.file.readline())[1])

    def keep(self, key: Key, answer: Answer) -> None:
        """What failed is not kept: it is asked again."""
        if answer.error is None:
            self._append([key, asdict(answer)])

    def _append(self, value: Any) -> None:
        self.file.write(json.dumps(value).encode() + b"\n")
        self.file.flush()


def answer(tasks: list[Task], engine: Local | Endpoint, ends, journal: Journal, meter) -> None:
    """Turn by turn: the first answers of all tasks together, then the second ones of those that
    have more."""
    left = Counter(task.number for task in tasks)
    turns, seed = engine.sampling.temperatures, engine.sampling.seed

    def take(task: Task, answer: Answer | None) -> None:
        task.take(answer)
        if task.ask is None:
            left[task.number] -= 1
            meter.add(int(left[task.number] == 0 and task.number not in journal.records))

    for task in tasks:
        take(task, None)
    while waiting := [task for task in tasks if task.ask is not None]:
        new, requests = [], []
        for task in waiting:
            if found := journal.known(task.key):
                take(task, found)
                continue
            new.append(task)
            noise = record_key([seed, *task.key])  # of nothing else: a second start has the same
            requests.append(Request(task.ask, noise, turns[task.number % len(turns)]))
        answers = engine.answers(requests, ends, lambda tokens: meter.add(0, tokens))
        for number, found in answers if requests else ():
            journal.keep(new[number].key, found)
            take(new[number], found)


def results(
    tasks: list[Task], rewriter: Rewriter, counts: Counter, bad: list[BadRow]
) -> Iterator[str]:
    """The lines of the records that got their answers; adds to `counts` and to `bad`."""
    for task in tasks:
        try:
            rewriter.check(task)
        except RowError as error:
            bad.append(BadRow.of(task.record, error))
            continue
        tokens, cut = (sum(getattr(a, name) for a in task.answers) for name in ("tokens", "cut"))
        found = {"answers": len(task.answers), "tokens": tokens, "cut_at_max_new_tokens": cut}
        counts.update({"written": 1, **found})
        yield json.dumps(task.written, ensure_ascii=False) + "\n"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
