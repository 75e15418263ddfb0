"""Tokenised rows on disk: Arrow, memory-mapped, under a fingerprint of all that shaped them.

An entry is a folder `rows.arrow` + `stats.json` + `quarantine.jsonl`, built beside its place and
renamed into it, so it is there whole or not at all. Of several processes that need the same entry,
ranks of a run among them, one builds it and the others wait for its lock; where there are no locks
each builds in its own temporary folder, the first rename wins, and the others' work is thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import DataConfig
from eagle.errors import EagleError
from eagle.loading import cache_folder
from eagle.meter import Bar, remaining
from records.quarantine import BadRow, read_quarantine, write_quarantine
from records.render import Renderer, record_key
from records.rows import RowError
from records.sources import Record, read_records
from records.tokens import tokenizer_hash

CODE_VERSION = 2  # raise when rendering changes: old entries are then not found
CHUNK_RECORDS = 500
MANY_BYTES = 8 << 20  # of data files, from which on every core tokenises
_renderer: Renderer | None = None  # of a process that tokenises
SHAPING_FIELDS = {
    "chat": ("max_length", "supervise"),
    "instruction": ("max_length", "supervise", "instruction_template"),
    "fim": ("max_length", "fim_spm_rate", "fim_spans_per_file", "fim_tokens", "seed"),
    "plain": ("max_length",),
    "tokenized": ("max_length",),
}


class CacheEntry(NamedTuple):
    """`table` has columns input_ids, loss_mask, key (hash of the record a row came from), and file
    (its number among the entry's files) and line of that record."""

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
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            entry = _open(folder, cache_hit=True)
            if entry is not None:
                return entry
            temporary.mkdir()
            _build(temporary, files, renderer, cfg.num_proc)
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


def _build(folder: Path, files: list[Path], renderer: Renderer, processes: int | None) -> None:
    import pyarrow as pa

    bad: list[BadRow] = []
    counts = {"records": 0, "rows": 0}
    size, seen = sum(path.stat().st_size for path in files), 0
    if processes is None:
        processes = _cores() if size >= MANY_BYTES else 1
    text = all(path.suffix.lower() != ".parquet" for path in files)  # whose size says how far it is
    began = time.monotonic()
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _schema()) as writer,
        Bar() as bar,
    ):
        for rows, refused, records, length in _rendered(_chunks(files), renderer, processes):
            writer.write_batch(rows)
            bad += refused
            counts["records"] += records
            counts["rows"] += rows.num_rows
            seen += length
            share, seconds = (
                min(seen / max(size, 1), 1.0) if text else 0.0,
                time.monotonic() - began,
            )
            rate = f"{counts['records'] / max(seconds, 1e-9):.0f} records/s"
            eta = f"ETA {remaining(seconds, share)}"
            bar.show(
                f"tokenised {counts['records']} records", share if text else None, f"{rate}  {eta}"
            )
    write_quarantine(bad, folder / "quarantine.jsonl")
    (folder / "stats.json").write_text(json.dumps(counts), encoding="utf-8")
    for name in ("rows.arrow", "stats.json"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.uint8())),
            ("key", pa.int64()),
            ("truncated", pa.bool_()),
            ("file", pa.int32()),
            ("line", pa.int64()),
        ]
    )


def _chunks(files: list[Path]) -> Iterator[list[tuple[int, Record]]]:
    """Records with the number of their file, some at a time; none at all are one empty chunk."""
    records = (
        (number, record) for number, path in enumerate(files) for record in read_records(path)
    )
    yield list(itertools.islice(records, CHUNK_RECORDS))
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield chunk


def _rendered(
    chunks: Iterator[list[tuple[int, Record]]], renderer: Renderer, processes: int
) -> Iterator[tuple[Any, list[BadRow], int, int]]:
    """`_render` of each chunk in their order, whatever the number of processes."""
    if processes == 1:
        yield from (_render(chunk, renderer) for chunk in chunks)
        return
    # forked: a renderer cannot be sent to another process, and what it needs is loaded here
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (renderer,)) as pool:
        ahead: deque = deque()
        try:
            for chunk in chunks:
                ahead.append(pool.submit(_render, chunk))
                if len(ahead) > 2 * processes:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise EagleError(
                "a process that tokenises was killed, perhaps for want of memory; lower data.num_proc"
            ) from error


def _begin(renderer: Renderer) -> None:
    """Of a process that tokenises: it leaves signals to its parent, and ends with it."""
    global _renderer
    _renderer = renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _render(
    chunk: list[tuple[int, Record]], renderer: Renderer | None = None
) -> tuple[Any, list[BadRow], int, int]:
    """(record batch of the good rows, bad records, number of records, bytes of their text)."""
    import pyarrow as pa

    render = renderer or _renderer
    rows, bad, length = [], [], 0
    for number, record in chunk:
        length += len(record.raw.encode("utf-8", "replace"))
        if record.value is None:
            assert record.error is not None
            reason = record.error.split(":")[0]
            bad.append(
                BadRow(
                    record.file,
                    record.line,
                    reason,
                    record.error,
                    "repair or remove this line",
                    record.raw,
                )
            )
            continue
        try:
            rendered = render(record.value)
        except RowError as error:
            bad.append(
                BadRow(record.file, record.line, error.reason, str(error), error.remedy, record.raw)
            )
            continue
        key = record_key(record.value)
        rows += [
            {
                "input_ids": ids,
                "loss_mask": mask,
                "key": key,
                "truncated": truncated,
                "file": number,
                "line": record.line,
            }
            for ids, mask, truncated in rendered
        ]
    return pa.RecordBatch.from_pylist(rows, schema=_schema()), bad, len(chunk), length


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when its holder ends, however it ends.
    Where the disk knows no
    locks, do without: the work is then done twice."""
    waiting = None
    with Bar() as bar:
        while True:
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
                file.close()  # whoever held it has removed it
            except BlockingIOError:
                file.close()
                if waiting is None:
                    waiting = "waiting for another process to tokenise the same data"
                    bar.doing(waiting)
                time.sleep(0.1)
            except OSError:
                break
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
