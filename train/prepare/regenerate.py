"""Answers written anew, record by record, into a file that a kill can only delay.

    ANSWERS.jsonl              records in the order of the input, answers replaced
    ANSWERS.card.json          who wrote them and how; how far the work is
    ANSWERS.quarantine.jsonl   records that got no answer, with the reason
    ANSWERS.journal            answers of the block in work, as they came; gone in the end

Work goes by blocks. An answer goes into the journal as soon as it is there, so that a kill costs
those in work alone. A block's lines are appended in order and synced, then the card says how long
the files are; what lies beyond after a kill is cut off and written again. Knows files and blocks;
records.py and answering.py know the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from configs.schema import DataConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import Meter
from records import load_tokenizer, shipped
from records.card import BY_TARGET, QUARANTINE, at_endpoint, card_path, file_hash
from records.quarantine import RAW_LIMIT, BadRow, diagnose
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
    """Write `output` anew, or go on with it; returns its card.

    who: "target" {id, fingerprint, adapter} and "engine" of the card; notes: what else it says, and
    may change from one start to the next. Output depends on the records, the sampling and the seed;
    in bf16 and fp16 near ties also on how many rows run together.
    """
    cfg = rewriter.cfg
    total = min(count_records(files), limit if limit is not None else 1 << 62)
    identity = {
        "format": cfg.format,
        **who,
        "sampling": {**asdict(sampling), "seed": seed},
        "source": {
            "files": [path.name for path in files],
            "sha256": [file_hash(path) for path in files],
        },
        "settings": {name: getattr(cfg, name) for name in _SHAPING.get(cfg.format, ())},
        "limit": limit,
    }
    journal = Journal(output, json.loads(json.dumps(identity)), notes or {})
    if journal.card["complete"]:
        return journal.card
    counts = journal.card["counts"]
    with Meter("answers", total, done=counts["records"], quiet=quiet) as meter:
        records = itertools.islice(read_all(files), counts["records"], total)
        while block := list(itertools.islice(records, engine.block)):
            lines, bad, found = write_block(
                block, counts["records"], rewriter, engine, sampling, seed, meter, journal
            )
            counts.update({name: counts[name] + found[name] for name in COUNTS})
            if counts["failed"] >= HOPELESS and not counts["written"]:
                raise EagleError(
                    f"the first {counts['failed']} records got no answer: {diagnose(bad)}"
                )
            journal.commit(lines, bad)
            meter.add(counts["records"] - meter.done)
    if not counts["written"]:
        raise EagleError(
            f"none of {counts['records']} records got an answer; see {journal.quarantine}"
        )
    return journal.finish()


_SHAPING = {
    "instruction": ("instruction_template",),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "seed"),
}


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
    *,
    adapter: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    device: str | None = None,
    compile: str = "auto",
) -> tuple[Rewriter, Local, dict]:
    """The target in this process; base None is the embedded model. It drafts if `head` is given.
    Returns what `regenerate` takes."""
    from transformers.utils.logging import disable_progress_bar

    from eagle.model import EaModel

    disable_progress_bar()
    model = EaModel.from_pretrained(
        base,
        head,
        adapter_path=adapter,
        quantization=quantization,
        dtype=dtype,
        device=device,
        compile=compile,
    )
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


def count_records(files: list[Path]) -> int:
    total = sum(1 for _ in read_all(files))
    if not total:
        raise EagleError(f"{files[0]} holds no record; put at least one row into it (--data)")
    return total


def read_all(files: list[Path]) -> Iterator[Record]:
    return itertools.chain.from_iterable(map(read_records, files))


def write_block(
    block: list[Record],
    first: int,
    rewriter: Rewriter,
    engine,
    sampling: Sampling,
    seed: int,
    meter: Meter,
    journal: Journal,
) -> tuple[list[str], list[BadRow], dict]:
    """The lines of a block's records, the failures, and the counts of both. first: number of its
    first record.
    """
    bad: list[BadRow] = []
    counts = dict.fromkeys(COUNTS, 0) | {"records": len(block)}
    tasks: list[tuple[int, int, Task]] = []  # record, part of it, task
    for n, record in enumerate(block):
        if record.value is None:
            bad.append(_bad(record, record.error, "repair or remove this line"))
            continue
        try:
            tasks += [(n, part, task) for part, task in enumerate(rewriter.tasks(record.value))]
        except RowError as error:
            bad.append(_bad(record, error.reason, error.remedy, str(error)))
    answer_all(tasks, first, engine, sampling, seed, meter, journal)
    lines = []
    for n, _, task in tasks:
        try:
            if task.failure is not None:
                raise RowError(*task.failure)
            exact = rewriter.check(task)
        except RowError as error:
            bad.append(_bad(block[n], error.reason, error.remedy, str(error)))
            continue
        lines.append(json.dumps(task.result(), ensure_ascii=False) + "\n")
        counts["written"] += 1
        counts["answers"] += len(task.answers)
        counts["kept_turns"] += task.kept
        counts["tokens"] += sum(answer.tokens for answer in task.answers)
        counts["cut_at_max_new_tokens"] += sum(answer.cut for answer in task.answers)
        counts["compared"] += exact is not None
        counts["token_exact"] += exact is True
    counts["failed"] = len(bad)
    return lines, bad, counts


def answer_all(
    tasks, first: int, engine, sampling: Sampling, seed: int, meter: Meter, journal: Journal
) -> None:
    """Turn by turn: the first answers of all tasks together, then the second ones of those that
    have more.
    """
    left = Counter(n for n, _, _ in tasks)
    known = journal.kept()

    def take(n: int, task: Task, answer: Answer) -> None:
        task.take(answer)
        if not task.unfinished:
            left[n] -= 1
            meter.add(int(left[n] == 0))

    for turn in itertools.count():
        asks = []
        for n, part, task in tasks:
            try:
                ask = task.next()
            except RowError as error:
                task.failure, ask = (str(error), error.remedy), None
            key = first + n, part, turn
            if ask is not None and key in known:
                take(n, task, known[key])
            elif ask is not None:
                asks.append((key, n, task, ask))
        if not asks and not any(task.unfinished for *_, task in tasks):
            return
        seeds = [request_seed(seed, *key) for key, *_ in asks]
        turns = sampling.temperatures
        temperatures = [turns[record % len(turns)] for (record, _, _), *_ in asks]
        answers = engine.answers(
            [ask for *_, ask in asks], seeds, temperatures, lambda tokens: meter.add(0, tokens)
        )
        for number, answer in answers if asks else ():
            key, n, task, _ = asks[number]
            journal.keep(key, answer)
            take(n, task, answer)


def request_seed(seed: int, record: int, part: int, turn: int) -> int:
    """62 bits that depend on nothing else, so that an interrupted run goes on with the same
    noise.
    """
    digest = hashlib.blake2b(repr((seed, record, part, turn)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _bad(record: Record, reason: str, remedy: str, message: str | None = None) -> BadRow:
    return BadRow(
        record.file, record.line, reason.split(" (")[0], message or reason, remedy, record.raw
    )


class Journal:
    """The three files. `card["progress"]` says how many bytes of the others count."""

    def __init__(self, output: Path, identity: dict, notes: dict) -> None:
        if output.suffix.lower() != ".jsonl":
            raise EagleError(f"--output {output}: answers are JSON lines, name a .jsonl file")
        self.output, self.path = output, card_path(output)
        self.quarantine, self.answers = self.beside(output), output.with_suffix(".journal")
        if self.path.exists():
            self.card = self._go_on(identity) | notes
            return
        if output.exists():
            raise EagleError(
                f"{output} exists and has no {self.path.name}; choose another --output"
            )
        writer = identity["target"]
        answers = BY_TARGET if writer["fingerprint"] else at_endpoint(writer["id"])
        self.card = {
            "card": 1,
            "file": output.name,
            "answers": answers,
            "policy": "on",
            **identity,
            **notes,
            "counts": dict.fromkeys(COUNTS, 0),
            "progress": {"output": 0, "quarantine": 0},
            "started": _now(),
            "complete": False,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        self._save()

    @staticmethod
    def beside(output: Path) -> Path:
        """Where the failures go."""
        return output.with_name(output.stem + QUARANTINE)

    def _go_on(self, identity: dict) -> dict:
        """The card of before; the files are cut back to what it vouches for."""
        try:
            card = json.loads(self.path.read_text(encoding="utf-8"))
            same = [k for k in identity if card[k] != identity[k]]
            sizes = card["progress"]["output"], card["progress"]["quarantine"]
            _ = card["counts"]["records"], card["complete"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EagleError(
                f"{self.path} is not a readable data card ({error}); delete it and {self.output.name}, or choose "
                "another --output"
            ) from error
        if same:
            key = same[0]
            raise EagleError(
                f"{self.output} was begun with {key}={_short(card[key])}, this command has "
                f"{_short(identity[key])}; run the same command to go on, or choose another --output"
            )
        for path, size in zip((self.output, self.quarantine), sizes, strict=True):
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise EagleError(
                    f"{path} has lost its end ({there} of {size} bytes); delete it and {self.path.name}, and "
                    "start again"
                )
            if there > size and not card["complete"]:
                os.truncate(path, size)
        return card

    def keep(self, key: tuple[int, int, int], answer: Answer) -> None:
        """One answer of the block in work. key: record, part of it, turn. What failed is asked
        again.
        """
        if answer.error is None:
            append(
                self.answers,
                [json.dumps([key, asdict(answer)], ensure_ascii=False) + "\n"],
                synced=False,
            )

    def kept(self) -> dict[tuple[int, int, int], Answer]:
        """What a kill left of the block, without a line that it cut."""
        if not self.answers.exists():
            return {}
        found, whole = {}, self.answers.read_bytes().rpartition(b"\n")
        os.truncate(self.answers, len(whole[0] + whole[1]))
        for line in whole[0].split(b"\n"):
            with suppress(ValueError, TypeError):
                key, answer = json.loads(line)
                found[tuple(key)] = Answer(**answer)
        return found

    def commit(self, lines: list[str], bad: list[BadRow]) -> None:
        failures = [
            json.dumps(
                {**row._asdict(), "where": row.where, "raw": row.raw[:RAW_LIMIT]},
                ensure_ascii=False,
            )
            + "\n"
            for row in bad
        ]
        self.card["progress"] = {
            "output": append(self.output, lines),
            "quarantine": append(self.quarantine, failures),
        }
        self._save()
        self.answers.unlink(missing_ok=True)

    def finish(self) -> dict:
        self.card |= {"complete": True, "finished": _now(), "sha256": file_hash(self.output)}
        self._save()
        return self.card

    def _save(self) -> None:
        atomic_write_text(self.path, json.dumps(self.card, indent=1, ensure_ascii=False) + "\n")


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def append(path: Path, lines: list[str], synced: bool = True) -> int:
    """Add lines and sync; returns the file's size, 0 when there is none. A lone surrogate of a
    record is written as the JSON escape that it came as."""
    if not lines:
        return path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
            if synced:
                sync(file)
            return file.tell()
    except OSError as error:
        raise EagleError(
            f"cannot write {path}: {error.strerror}; make room, and run the same command again to go on"
        ) from error


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
