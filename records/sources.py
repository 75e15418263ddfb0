"""Files -> records, each with the place it comes from. JSONL, JSON arrays and Parquet.

Knows nothing of tokenizers or formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eagle.errors import EagleError
from records.card import CARD, QUARANTINE

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet")
NO_DATA = (CARD, QUARANTINE)  # what stands beside data that was regenerated


class Record(NamedTuple):
    """`value` is the record, or None with `error` saying why there is none. `line` is 1-based."""

    file: str
    line: int
    value: dict | None
    error: str | None
    raw: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def resolve(paths: Iterable[str | Path]) -> list[Path]:
    """Existing data files; a folder stands for the data files in it."""
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in EXTENSIONS and not p.name.endswith(NO_DATA)
            )
            if not inside:
                raise EagleError(f"{path}: no {', '.join(EXTENSIONS)} file in this folder")
            files += inside
        elif not path.exists():
            raise EagleError(f"{path}: no such data file; check the path (data.path)")
        elif path.suffix.lower() not in EXTENSIONS:
            raise EagleError(
                f"{path}: unknown data file type {path.suffix!r}; convert it to "
                f"one of {', '.join(EXTENSIONS)}"
            )
        else:
            files.append(path)
    if not files:
        raise EagleError("data.path names no file")
    return files


def read_records(path: Path) -> Iterator[Record]:
    """Records of one file in order; what cannot be read as an object comes with its error."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".json":
            yield from _read_json(path)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise EagleError(f"{path}: cannot read this file: {error.strerror or error}") from error


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                yield _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Record:
    raw = line.decode("utf-8", "replace").rstrip("\r\n")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(str(path), number, None, f"not UTF-8 (byte {error.start + 1})", raw)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        message = getattr(error, "msg", "nested too deep")
        return Record(str(path), number, None, f"malformed JSON: {message}{place}", raw)
    return _object(path, number, value, raw)


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of objects; `line` is the item's number. JSONL under this name works too."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EagleError(f"{path}: not UTF-8 (byte {error.start + 1}); convert it") from error
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            yield from _read_lines(path)
            return
        line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
        reason = getattr(error, "msg", "nested too deep")
        raise EagleError(
            f"{path}:{line}: malformed JSON: {reason} at column {column}; "
            "repair the array, or write one object per line as .jsonl"
        ) from error
    if isinstance(items, dict):
        items = [items]
    if not isinstance(items, list):
        raise EagleError(f"{path}: must hold an array of objects, not {type(items).__name__}")
    for number, item in enumerate(items, 1):
        raw = json.dumps(item, ensure_ascii=False)
        yield _object(path, number, item, raw)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for item in batch.to_pylist():
                    number += 1
                    value = {key: cell for key, cell in item.items() if cell is not None}
                    raw = json.dumps(value, ensure_ascii=False, default=str)
                    yield Record(str(path), number, value, None, raw)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise EagleError(f"{path}: not a readable Parquet file: {reason}") from error


def _object(path: Path, number: int, value: Any, raw: str) -> Record:
    if not isinstance(value, dict):
        kind = type(value).__name__
        return Record(str(path), number, None, f"not a JSON object but {kind}", raw)
    return Record(str(path), number, value, None, raw)
