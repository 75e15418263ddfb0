"""Answers written anew, record by record, into a file that a kill can only delay.

    ANSWERS.journal            answers as they come, while the work goes on
    ANSWERS.jsonl              in the end: records in the order of the input, answers replaced
    ANSWERS.quarantine.jsonl   records that got no answer, with the reason
    ANSWERS.card.json          who wrote the answers and how

Work goes by blocks, which bound the memory. Started again, it reads what the journal holds of each
block and asks for the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema import DataConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import Meter
from records import load_tokenizer, shipped
from records.card import BY_TARGET, QUARANTINE, at_endpoint, card_path, file_hash
from records.quarantine import BadRow, diagnose, object_of, write_quarantine
from records.rows import RowError
from records.sources import Record, read_records, resolve
from train.prepare.answering import Endpoint, Local, Sampling
from train.prepare.records import Answer, Rewriter, Task, require_answers

HOPELESS = 16  # records that fail before any succeeds: the run stops
COUNTS = (
    "records",
    "written",
    "failed",
    "answers",
    "tokens",
    "cut_at_max_new_tokens",
    "kept_turns",
    "compared",
    "token_exact",
)
SHAPING = {  # settings that prompts depend on
    "instruction": ("instruction_template",),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "seed"),
}
Key = tuple[int, int, int]  # of an answer: number of the record, part of it, turn


def regenerate(
    files: list[Path],
    output: Path,
    rewriter: Rewriter,
    engine: Local | Endpoint,
    who: dict,
    sampling: Sampling,
    seed: int = 0,
    limit: int | None = None,
    notes: dict | None = None,
    quiet: bool = False,
) -> dict:
    """Write `output`, or go on with it; returns its card.

    who: "target" {id, fingerprint, adapter} and "engine" of the card; notes: what else it says, and
    may change from one start to the next. Output depends on the records, the sampling and the seed;
    in bf16 and fp16 near ties also on how many rows run together.
    """
    identity = identity_of(files, rewriter.cfg, who, sampling, seed, limit)
    card = finished(output, identity)
    if card is not None:
        return card
    total = sum(1 for _ in itertools.islice(read_all(files), limit))
    if not total:
        raise EagleError(f"{files[0]} holds no record; put at least one row into it (--data)")
    started, counts, bad = now(), Counter(dict.fromkeys(COUNTS, 0)), []
    part = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            Journal(output, identity) as journal,
            Meter("answers", total, done=journal.reached, quiet=quiet) as meter,
            part.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            records = itertools.islice(read_all(files), total)
            while block := list(itertools.islice(records, engine.block)):
                work = Block(block, counts["records"], rewriter)
                work.answer(engine, sampling, seed, journal, meter)
                found = work.results(counts)
                bad += work.bad
                file.writelines(found)
                if len(bad) >= HOPELESS and not counts["written"]:
                    reasons = diagnose(bad)
                    raise EagleError(f"the first {len(bad)} records got no answer: {reasons}")
            file.flush()
            os.fsync(file.fileno())
        write_quarantine(bad, quarantine_path(output))
        if not counts["written"]:
            raise EagleError(
                f"none of {total} records got an answer; see {quarantine_path(output)}"
            )
        os.replace(part, output)
        card = {
            "card": 1,
            "file": output.name,
            "answers": answered_by(identity["target"]),
            "policy": "on",
            **identity,
            **(notes or {}),
            "counts": dict(counts),
            "started": started,
            "finished": now(),
            "complete": True,
            "sha256": file_hash(output),
        }
        atomic_write_text(card_path(output), json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        journal.path.unlink()
    except OSError as error:
        raise EagleError(
            f"cannot write {error.filename or output}: {error.strerror}; make room, and run the "
            "same command again to go on"
        ) from error
    return card


def identity_of(
    files: list[Path], cfg: DataConfig, who: dict, sampling: Sampling, seed: int, limit: int | None
) -> dict:
    """What the answers depend on."""
    identity = {
        "format": cfg.format,
        **who,
        "sampling": {**asdict(sampling), "seed": seed},
        "source": {
            "files": [path.name for path in files],
            "sha256": [file_hash(path) for path in files],
        },
        "settings": {name: getattr(cfg, name) for name in SHAPING.get(cfg.format, ())},
        "limit": limit,
    }
    return json.loads(json.dumps(identity))


def answered_by(writer: dict) -> str:
    return BY_TARGET if writer["fingerprint"] else at_endpoint(writer["id"])


def finished(output: Path, identity: dict) -> dict | None:
    """The card of an output that is done. Refuses to write over anything else."""
    if output.suffix.lower() != ".jsonl":
        raise EagleError(f"--output {output}: answers are JSON lines, name a .jsonl file")
    path = card_path(output)
    if not path.exists():
        if output.exists() and not output.with_suffix(".journal").exists():
            raise EagleError(f"{output} exists and has no {path.name}; choose another --output")
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        digest = card["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EagleError(
            f"{path} is not a readable data card ({error!r}); delete it and {output.name}, or "
            "choose another --output"
        ) from error
    require_same(output, card, identity)
    if not output.exists() or file_hash(output) != digest:
        raise EagleError(
            f"{output} has changed since {path.name} was written; delete both, and start again"
        )
    return card


def require_same(output: Path, begun: dict, identity: dict) -> None:
    for key, value in identity.items():
        if begun.get(key) != value:
            raise EagleError(
                f"{output} was begun with {key}={_short(begun.get(key))}, this command has "
                f"{_short(value)}; run the same command to go on, or choose another --output"
            )


def quarantine_path(output: Path) -> Path:
    return output.with_name(output.stem + QUARANTINE)


class Journal:
    """Answers in the order of their blocks, after a line that says what they belong to. `reached`:
    the last record that an earlier start got an answer for."""

    def __init__(self, output: Path, identity: dict) -> None:
        self.path, self.reached = output.with_suffix(".journal"), 0
        self.file = open(self.path, "ab+")
        self.file.seek(0)
        whole, last = 0, b""
        for line in self.file:
            if line.endswith(b"\n"):  # else a kill has cut it
                whole, last = whole + len(line), line
                if whole == len(line):
                    require_same(output, json.loads(line), identity)
        self.file.truncate(whole)
        if not whole:
            self._append(identity)
        elif last.startswith(b"["):
            self.reached = json.loads(last)[0][0]
        self.file.seek(0)
        self.place = len(self.file.readline())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def known(self, end: int) -> dict[Key, Answer]:
        """What is there for the records before `end`, less what was read before."""
        found = {}
        self.file.seek(self.place)
        for line in iter(self.file.readline, b""):
            key, answer = json.loads(line)
            if key[0] >= end:
                break
            found[tuple(key)] = Answer(**answer)
            self.place += len(line)
        return found

    def keep(self, key: Key, answer: Answer) -> None:
        """What failed is not kept: it is asked again."""
        if answer.error is None:
            self._append([key, asdict(answer)])

    def _append(self, value: Any) -> None:
        self.file.write(json.dumps(value).encode() + b"\n")
        self.file.flush()


class Block:
    """Some records in work. first: the number of the first one."""

    def __init__(self, records: list[Record], first: int, rewriter: Rewriter) -> None:
        self.records, self.first, self.rewriter = records, first, rewriter
        self.bad: list[BadRow] = []
        self.tasks: list[tuple[int, int, Task]] = []  # number of the record, part of it, task
        for n, record in enumerate(records, first):
            try:
                tasks = rewriter.tasks(object_of(record))
                self.tasks += [(n, part, task) for part, task in enumerate(tasks)]
            except RowError as error:
                self.bad.append(BadRow.of(record, error))

    def answer(
        self,
        engine: Local | Endpoint,
        sampling: Sampling,
        seed: int,
        journal: Journal,
        meter: Meter,
    ) -> None:
        """Turn by turn: the first answers of all tasks together, then the second ones of those that
        have more.
        """
        left = Counter(n for n, _, _ in self.tasks)
        known, turns = journal.known(self.first + len(self.records)), sampling.temperatures

        def take(n: int, task: Task, answer: Answer) -> None:
            task.take(answer)
            if task.ask is None:
                left[n] -= 1
                meter.add(int(left[n] == 0 and n >= journal.reached))

        while waiting := [entry for entry in self.tasks if entry[2].ask is not None]:
            asked: list[tuple[Key, Task]] = []
            for n, part, task in waiting:
                key = n, part, len(task.answers)
                if key in known:
                    take(n, task, known[key])
                else:
                    asked.append((key, task))
            seeds = [request_seed(seed, *key) for key, _ in asked]
            temperatures = [turns[record % len(turns)] for (record, _, _), _ in asked]
            asks = [task.ask for _, task in asked]
            answers = engine.answers(asks, seeds, temperatures, lambda n: meter.add(0, n))
            for number, answer in answers if asked else ():
                key, task = asked[number]
                journal.keep(key, answer)
                take(key[0], task, answer)

    def results(self, counts: Counter) -> list[str]:
        """The lines of the records that got their answers; adds to `counts` and to `bad`."""
        lines = []
        for n, _, task in self.tasks:
            try:
                exact = self.rewriter.check(task)
            except RowError as error:
                self.bad.append(BadRow.of(self.records[n - self.first], error))
                continue
            lines.append(json.dumps(task.record, ensure_ascii=False) + "\n")
            counts["answers"] += len(task.answers)
            counts["kept_turns"] += task.kept
            counts["tokens"] += sum(answer.tokens for answer in task.answers)
            counts["cut_at_max_new_tokens"] += sum(answer.cut for answer in task.answers)
            counts["compared"] += exact is not None
            counts["token_exact"] += exact is True
        counts["records"] += len(self.records)
        counts["written"] += len(lines)
        counts["failed"] += len(self.bad)
        return lines


def request_seed(seed: int, record: int, part: int, turn: int) -> int:
    """62 bits that depend on nothing else, so that an interrupted run goes on with the same
    noise.
    """
    digest = hashlib.blake2b(repr((seed, record, part, turn)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def read_all(files: list[Path]) -> Iterator[Record]:
    return itertools.chain.from_iterable(map(read_records, files))


def find_files(cfg: DataConfig) -> list[Path]:
    """`data.path`, or the shipped file of the format."""
    require_answers(cfg)
    if cfg.paths:
        return resolve(cfg.paths)
    found = shipped(cfg.format)
    if found is None:
        raise EagleError(f"no {cfg.format} data set is shipped: give data.path (--data FILE)")
    return [found]


def open_local(
    cfg: DataConfig,
    sampling: Sampling,
    base: str | None = None,
    head: str | None = None,
    slots: int = 8,
    adapter: str | None = None,
    **loading: Any,
) -> tuple[Rewriter, Local, dict]:
    """The target in this process; base None is the embedded model. It drafts if `head` is given.
    loading: of `EaModel.from_pretrained`. Returns what `regenerate` takes."""
    from transformers.utils.logging import disable_progress_bar

    from eagle.model import EaModel

    disable_progress_bar()
    model = EaModel.from_pretrained(base, head, adapter_path=adapter, **loading)
    rewriter = Rewriter(cfg, load_tokenizer(base), model.eos_token_ids)
    who = {"target": model.target.identity, "engine": {"kind": "local"}}
    return rewriter, Local(model, rewriter.ends, sampling, slots, head is not None), who


def open_endpoint(
    cfg: DataConfig,
    sampling: Sampling,
    url: str,
    model: str,
    tokenizer: str | None = None,
    extra: dict | None = None,
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout: float = 600.0,
) -> tuple[Rewriter, Endpoint, dict]:
    """A server that has the target. Nobody compares its weights: the card has no fingerprint."""
    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env)
        if not key:
            raise EagleError(f"--api_key_env {api_key_env}: this environment variable is not set")
    rewriter = Rewriter(cfg, load_tokenizer(tokenizer) if tokenizer is not None else None)
    engine = Endpoint(
        url, model, sampling, key=key, extra=extra, concurrency=concurrency, timeout=timeout
    )
    target = {"id": model, "fingerprint": None, "adapter": None, "dtype": None}
    return rewriter, engine, {"target": target, "engine": {"kind": "endpoint", "body": extra or {}}}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
