"""Tokenised rows on disk: Arrow, memory-mapped, under a fingerprint of all that shaped them.

An entry is a folder `rows*.arrow` + `stats.json`, built beside its place and renamed into it, so it
is there whole or not at all. Of several processes that need the same entry, ranks of a run among
them, one builds it and the others wait for its lock."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from configs.schema import DataConfig
from eagle.checkpoint import atomic_dir
from eagle.errors import EagleError
from eagle.loading import cache_folder
from eagle.meter import Bar
from records.card import file_hash
from records.quarantine import BadRow, enforce, object_of
from records.render import Renderer, record_key
from records.rows import RowError
from records.sources import Record, read_records
from records.tokens import tokenizer_hash

CODE_VERSION = 4  # raise when rendering changes: old entries are then not found
BATCH = 500  # records
MANY_BYTES = 8 << 20  # of data files, from which on every core tokenises
SHAPING_FIELDS = {
    "chat": ("max_length", "supervise"),
    "instruction": ("max_length", "supervise", "instruction_template"),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "fim_tokens", "seed"),
    "plain": ("max_length",),
    "tokenized": ("max_length",),
}


class CacheEntry(NamedTuple):
    """`table` has what `_render` says: key is the hash of the record that a row came from, file its
    number among the entry's files. `good` are its rows that have tokens, others are bad records.
    unused: records of each file (by number) that have a field which is not used."""

    table: pa.Table
    good: np.ndarray
    bad: list[BadRow]
    records: int
    cache_hit: bool
    unused: dict[int, Counter[str]]


def cache_root(cfg: DataConfig) -> Path:
    root = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else cache_folder()
    return root / "tokenised"


def fingerprint(files: list[Path], data_format: str, cfg: DataConfig, tokenizer: Any) -> str:
    """Depends on the files' names and bytes, the tokenizer, the template and the config."""
    digest = hashlib.sha256()
    shaping = {field: getattr(cfg, field) for field in ("strict", *SHAPING_FIELDS[data_format])}
    digest.update(repr((CODE_VERSION, data_format, shaping, tokenizer_hash(tokenizer))).encode())
    for path in files:
        try:
            digest.update(json.dumps([str(path), file_hash(path)]).encode())
        except OSError as error:
            raise EagleError(f"{path}: cannot read this file: {error.strerror}") from error
    return digest.hexdigest()[:32]


def load_or_build(
    files: list[Path], data_format: str, cfg: DataConfig, tokenizer: Any, renderer: Renderer
) -> CacheEntry:
    """The cached rows of `files`, rendered now when there is no whole entry yet."""
    folder = cache_root(cfg) / fingerprint(files, data_format, cfg, tokenizer)
    if entry := _open(folder):
        return entry
    try:
        with _alone(folder.parent.parent / "locks" / folder.name):
            if entry := _open(folder):
                return entry
            with atomic_dir(folder) as temporary:
                _build(temporary, files, renderer, cfg.num_proc)
    except OSError as error:
        raise EagleError(
            f"cannot write tokenised data to {folder.parent}: {error.strerror or error}; "
            "set data.cache_dir or $EAGLE_CACHE to a folder with space"
        ) from error
    entry = _open(folder)
    assert entry is not None, f"{folder} vanished while it was being used"
    return entry._replace(cache_hit=False)


def _open(folder: Path) -> CacheEntry | None:
    """The entry in `folder`, or None when it is absent or damaged (it is then rebuilt)."""
    try:
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        maps = [pa.memory_map(str(path)) for path in sorted(folder.glob("rows*.arrow"))]
        table = pa.concat_tables([pa.ipc.open_stream(each).read_all() for each in maps])
    except (OSError, ValueError, pa.ArrowException):
        return None
    if len(table) != stats["rows"]:
        return None
    column = table.column("bad")
    bad = [BadRow(*json.loads(text)) for text in column.drop_null().to_pylist()]
    good = np.flatnonzero(column.is_null().to_numpy())
    unused: dict[int, Counter[str]] = defaultdict(Counter)
    grouped = table.select(["file", "unused"]).group_by(["file", "unused"])
    for row in grouped.aggregate([([], "count_all")]).to_pylist():
        counts = dict.fromkeys(json.loads(row["unused"] or "[]"), row["count_all"])
        unused[row["file"]].update(counts)
    return CacheEntry(table, good, bad, stats["records"], True, unused)


def _build(folder: Path, files: list[Path], renderer: Renderer, processes: int | None) -> None:
    import datasets

    many = sum(path.stat().st_size for path in files) >= MANY_BYTES
    processes = processes or (os.cpu_count() if many else 1)
    records = _read(files, folder / "read.arrow")
    enforce([], len(records), 1.0, None)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with Bar() as bar:
        bar.doing(f"tokenising {len(records)} records")
        try:
            with children_end_with_us():
                rows = records.map(
                    functools.partial(_render, files=files, renderer=renderer),
                    batched=True,
                    batch_size=BATCH,
                    num_proc=processes if processes > 1 else None,
                    remove_columns=records.column_names,
                    cache_file_name=str(folder / "rows.arrow"),
                    new_fingerprint=folder.name[-32:],
                    desc="tokenising",
                )
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise EagleError(
                "a process that tokenises was killed, for want of memory? lower data.num_proc"
            ) from error
    (folder / "stats.json").write_text(json.dumps({"records": len(records), "rows": len(rows)}))
    (folder / "read.arrow").unlink()


def _read(files: list[Path], path: Path) -> Any:
    """The records of all files, unparsed."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    types = {"file": pa.int32(), "line": pa.int64(), "raw": pa.large_string(), "error": pa.string()}
    with ArrowWriter(path=str(path), schema=pa.schema(types)) as writer:
        for number, file in enumerate(files):
            for record in read_records(file):
                cells = number, record.line, record.raw, record.error
                writer.write(dict(zip(types, cells, strict=True)))
        writer.finalize()
    return Dataset.from_file(str(path))


def _render(batch: dict[str, list], files: list[Path], renderer: Renderer) -> Any:
    """Rows of the good records; one without tokens, that says why, for each of the bad."""
    rows = []
    for number, line, raw, error in zip(*batch.values(), strict=True):
        value = json.loads(raw) if error is None else None
        record = Record(str(files[number]), line, value, error, raw)
        place = {"file": number, "line": line}
        try:
            key = record_key(object_of(record))
            for ids, mask, truncated, unused in renderer(record.value):
                row = {"input_ids": ids, "loss_mask": mask, "key": key, "truncated": truncated}
                rows.append(row | place | ({"unused": json.dumps(unused)} if unused else {}))
        except RowError as error:
            bad = {"bad": json.dumps(BadRow.of(record, error)), "key": 0, "truncated": False}
            rows.append({"input_ids": [], "loss_mask": []} | bad | place)
    columns = {
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.uint8()),
        "key": pa.int64(),
        "truncated": pa.bool_(),
        "file": pa.int32(),
        "line": pa.int64(),
        "bad": pa.string(),
        "unused": pa.string(),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


_parent: int | None = None  # of the processes that tokenise, while it starts them


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """Processes forked in the block leave signals to this one and end with it, even one that still
    waits for its first work when this one is killed. `datasets` puts a copy in the place of
    os.environ, whose later changes nobody sees who keeps the original (rich): it is put back."""
    global _parent
    _parent, environment = os.getpid(), os.environ
    try:
        yield
    finally:
        _parent, os.environ = None, environment


def _begin() -> None:
    if (parent := _parent) is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:  # PR_SET_PDEATHSIG ends with the thread that forked: a pool has its own
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


os.register_at_fork(after_in_child=_begin)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees when its holder ends, however it ends. Where the disk knows
    no locks, do without: the work is then done twice."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with Bar() as bar, suppress(NotImplementedError):
        bar.doing("waiting for another process to tokenise the same data")
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()
