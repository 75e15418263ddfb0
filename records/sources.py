"""Files -> records, each with the place it comes from. JSONL, JSON arrays and Parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eagle.errors import EagleError
from eagle.loading import EMBEDDED
from records.card import CARD, QUARANTINE

BOM = b"\xef\xbb\xbf"
EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet")
NO_DATA = (CARD, QUARANTINE)  # what stands beside data that was regenerated


SHIPPED_FORMATS = ("chat", "fim", "instruction")


def shipped(data_format: str, split: str = "train") -> Path | None:
    """The shipped file of a format (`split` train or eval); None when there is none."""
    name = f"{data_format}.jsonl" if split == "train" else f"heldout_{data_format}.jsonl"
    path = EMBEDDED / "data" / name
    return path if data_format in SHIPPED_FORMATS and path.is_file() else None


class Record(NamedTuple):
    """`value` is the record, or None with `error` saying why there is none. `line` is 1-based."""

    file: str
    line: int
    value: dict | None
    error: str | None
    raw: str


def resolve(paths: Iterable[str | Path]) -> list[Path]:
    """Existing data files; a folder stands for the data files in it."""
    files: list[Path] = []
    kinds = ", ".join(EXTENSIONS)
    for path in [Path(given).expanduser() for given in paths]:
        if not path.exists():
            raise EagleError(f"{path}: no such data file; check the path (data.path)")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [p for p in inside if p.suffix.lower() in EXTENSIONS]
        found = [p for p in found if path == p or not p.name.endswith(NO_DATA)]
        if not found:
            raise EagleError(f"{path}: neither a {kinds} file nor a folder with one; convert it")
        files += found
    if not files:
        raise EagleError("data.path names no file")
    return files


def read_records(path: Path) -> Iterator[Record]:
    """Records of one file in order; what cannot be read as an object comes with its error."""
    readers = {".parquet": _read_parquet, ".json": _read_json}
    try:
        yield from readers.get(path.suffix.lower(), _read_lines)(path)
    except OSError as error:
        raise EagleError(f"{path}: cannot read this file: {error.strerror or error}") from error


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                raw = line.decode("utf-8", "replace").rstrip("\r\n")
                yield _record(path, number, *_parse(line), raw)


def _parse(line: bytes) -> tuple[Any, str | None]:
    """(value, why there is none)."""
    try:
        return json.loads(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"malformed JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return None, "malformed JSON: nested too deep"


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of objects; `line` is the item's number. JSONL under this name works too."""
    data = path.read_bytes().removeprefix(BOM)
    try:
        items = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not data.lstrip().startswith(b"["):
            yield from _read_lines(path)
            return
        line = getattr(error, "lineno", 0)
        raise EagleError(f"{path}:{line}: malformed JSON: {error}; repair the array") from error
    items = [items] if isinstance(items, dict) else items
    if not isinstance(items, list):
        raise EagleError(f"{path}: must hold an array of objects, not {type(items).__name__}")
    for number, item in enumerate(items, 1):
        yield _record(path, number, item, None, json.dumps(item, ensure_ascii=False))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1000))
            for number, item in enumerate(itertools.chain.from_iterable(batches), 1):
                value = {key: cell for key, cell in item.items() if cell is not None}
                raw = json.dumps(value, ensure_ascii=False, default=str)
                yield Record(str(path), number, value, None, raw)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise EagleError(f"{path}: not a readable Parquet file: {reason}") from error


def _record(path: Path, number: int, value: Any, error: str | None, raw: str) -> Record:
    if error is None and not isinstance(value, dict):
        value, error = None, f"not a JSON object but {type(value).__name__}"
    return Record(str(path), number, value, error, raw)
