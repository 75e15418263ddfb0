"""Tokenised rows on disk: Arrow, memory-mapped, under a fingerprint of all that shaped them.

An entry is a folder `rows.arrow` + `stats.json` + `quarantine.jsonl`, built beside its place and
renamed into it, so it is there whole or not at all. Several processes may build the same entry:
each in its own temporary folder, the first rename wins, and the others' work is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import DataConfig
from eagle.errors import EagleError
from eagle.loading import cache_folder
from train.data.quarantine import BadRow, read_quarantine, write_quarantine
from train.data.render import Renderer, record_key
from train.data.rows import Row, RowError
from train.data.sources import read_records
from train.data.tokens import tokenizer_hash

CODE_VERSION = 2  # raise when rendering changes: old entries are then not found
BATCH_ROWS = 1000
SHAPING_FIELDS = {
    "chat": ("max_length", "supervise"),
    "instruction": ("max_length", "supervise", "instruction_template"),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "fim_tokens", "seed"),
    "plain": ("max_length",),
    "tokenized": ("max_length",),
}


class CacheEntry(NamedTuple):
    """`table` has columns input_ids, loss_mask, key (hash of the record a row came from), and file (its
    number among the entry's files) and line of that record."""

    table: Any
    records: int
    bad: list[BadRow]
    cache_hit: bool
    folder: Path


def cache_root(cfg: DataConfig) -> Path:
    root = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else cache_folder()
    return root / "tokenised"


def fingerprint(files: list[Path], data_format: str, cfg: DataConfig, tokenizer: Any) -> str:
    """Depends on the files' names and bytes, the tokenizer, the template and the config."""
    digest = hashlib.sha256()
    shaping = {field: getattr(cfg, field) for field in SHAPING_FIELDS[data_format]}
    digest.update(repr((CODE_VERSION, data_format, shaping, tokenizer_hash(tokenizer))).encode())
    for path in files:
        digest.update(json.dumps([str(path), path.stat().st_size]).encode())
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise EagleError(f"{path}: cannot read this file: {error.strerror}") from error
    return digest.hexdigest()[:32]


def load_or_build(
    files: list[Path], data_format: str, cfg: DataConfig, tokenizer: Any, renderer: Renderer
) -> CacheEntry:
    """The cached rows of `files`, rendered now when there is no whole entry yet."""
    folder = cache_root(cfg) / fingerprint(files, data_format, cfg, tokenizer)
    entry = _open(folder, cache_hit=True)
    if entry is not None:
        return entry
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        _build(temporary, files, renderer)
        _publish(temporary, folder)
    except OSError as error:
        raise EagleError(
            f"cannot write tokenised data to {folder.parent}: {error.strerror or error}; "
            "set data.cache_dir or $EAGLE_CACHE to a folder with space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    entry = _open(folder, cache_hit=False)
    assert entry is not None, f"{folder} vanished while it was being used"
    return entry


def _publish(temporary: Path, folder: Path) -> None:
    for _ in range(3):
        try:
            temporary.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _open(folder, cache_hit=True) is not None:
            return  # another process was faster
        shutil.rmtree(folder, ignore_errors=True)  # a damaged entry
    temporary.rename(folder)


def _open(folder: Path, cache_hit: bool) -> CacheEntry | None:
    """The entry in `folder`, or None when it is absent or damaged (it is then rebuilt)."""
    import pyarrow
    from datasets import Dataset

    try:
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        bad = read_quarantine(folder / "quarantine.jsonl")
        table = Dataset.from_file(str(folder / "rows.arrow"))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return None
    if len(table) != stats["rows"]:
        return None
    return CacheEntry(table, stats["records"], bad, cache_hit, folder)


def _build(folder: Path, files: list[Path], renderer: Renderer) -> None:
    import pyarrow as pa

    bad: list[BadRow] = []
    counts = {"records": 0, "rows": 0}
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.uint8())),
            ("key", pa.int64()),
            ("truncated", pa.bool_()),
            ("file", pa.int32()),
            ("line", pa.int64()),
        ]
    )
    path = folder / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[dict[str, Any]] = []
        for (file, line), key, row in _rows(files, renderer, bad, counts):
            ids, mask, truncated = row
            batch.append({"input_ids": ids, "loss_mask": mask, "key": key, "truncated": truncated,
                          "file": file, "line": line})  # fmt: skip
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch = []
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    write_quarantine(bad, folder / "quarantine.jsonl")
    (folder / "stats.json").write_text(json.dumps(counts), encoding="utf-8")
    for name in ("rows.arrow", "stats.json"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _rows(
    files: list[Path], renderer: Renderer, bad: list[BadRow], counts: dict[str, int]
) -> Iterator[tuple[tuple[int, int], int, Row]]:
    """(file number, line), record key and row of every good record; bad ones go to `bad`."""
    for number, path in enumerate(files):
        for record in read_records(path):
            counts["records"] += 1
            if record.value is None:
                assert record.error is not None
                reason = record.error.split(":")[0]
                bad.append(BadRow(record.file, record.line, reason, record.error,
                                  "repair or remove this line", record.raw))  # fmt: skip
                continue
            try:
                rendered = renderer(record.value)
            except RowError as error:
                bad.append(BadRow(record.file, record.line, error.reason, str(error),
                                  error.remedy, record.raw))  # fmt: skip
                continue
            key = record_key(record.value)
            for row in rendered:
                counts["rows"] += 1
                yield (number, record.line), key, row
