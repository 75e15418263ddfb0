"""Names -> data files -> records, each with the place that it comes from.

    rows       .jsonl .ndjson .json (an array) .csv .tsv (a header, then text) .parquet .arrow
    documents  .txt .md .rst and source code: a file is one record, {"text": ...}

Text may be packed (.gz, .zst) and may be UTF-16 or UTF-32, with or without a byte-order mark;
`\\r\\n` ends a line as `\\n` does."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eagle.errors import EagleError
from eagle.loading import EMBEDDED
from records.card import CARD, QUARANTINE
from records.folders import SOURCE_CODE, find_documents, hub_files, saved_files

TEXTS = (".txt", ".md", ".rst")
PACKED = {".gz": "gzip", ".zst": "zstd"}
# what stands beside data that was regenerated, or that came from the hub
NO_DATA = (CARD, QUARANTINE, "dataset_infos.json")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))??(?::([\w.-]+))?")
DEEPEST = 100  # levels of a record
TOO_DEEP = "malformed JSON: nested too deep"
TOO_LONG = "malformed JSON: a number of thousands of digits"

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


def resolve(paths: Iterable[str | Path], data_format: str | None = None) -> list[Path]:
    """Data files that can be opened. A name is that of a file, a pattern of files (`*`, `**`), a
    folder of files or one that `datasets.save_to_disk` wrote, or a hub data set, ORG/NAME or
    ORG/NAME:CONFIG; `:SPLIT` behind a data set says which. With `data_format` fim also of source
    code (plain: and texts), of which a folder without rows stands for all in and below it."""
    documents = {"fim": SOURCE_CODE, "plain": (*TEXTS, *SOURCE_CODE)}.get(data_format, ())
    files = [file for path in paths for file in _resolve(path, documents)]
    if not files:
        raise EagleError("data.path names no file")
    for path in files:
        try:
            if path.is_fifo():
                raise OSError("it is a pipe")
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from error
    return files


def kind_of(path: Path) -> str:
    """The extension without that of the packing: .jsonl of x.jsonl.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def _resolve(given: str | Path, documents: tuple[str, ...]) -> list[Path]:
    name, path = str(given), Path(given).expanduser()
    known = (*READERS, *TEXTS, *documents)
    try:
        if path.is_dir():
            found = _in_folder(path, documents)
        elif path.is_file():
            found = [path] if kind_of(path) in known else []
        elif glob.has_magic(name):
            matched = map(Path, sorted(glob.glob(str(path), recursive=True)))
            matched = [p for p in matched if not p.is_dir() and not p.name.endswith(NO_DATA)]
            if not matched:
                raise EagleError(f"{path}: no file matches this pattern (data.path)")
            each = (_resolve(p, documents) if p.is_file() else [p] for p in matched)
            return list(itertools.chain.from_iterable(each))
        else:
            return _in_data_set(name)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not found:
        said = f"{path}: neither a {', '.join(known[:10])} file nor a folder with one"
        raise EagleError(f"{said}; convert it, or name files by a pattern (FOLDER/**/*.parquet)")
    return found


def _in_folder(folder: Path, documents: tuple[str, ...]) -> list[Path]:
    if (files := saved_files(folder)) is not None:
        return files
    there = [p for p in sorted(folder.iterdir()) if kind_of(p) in READERS]
    rows = [p for p in there if not p.name.endswith(NO_DATA)]
    if documents and all(kind_of(p) in (".json", ".csv", ".tsv") for p in rows):
        # beside source code these are settings and tables
        return find_documents(folder, documents) or rows
    return rows


def _in_data_set(name: str) -> list[Path]:
    folder, _, split = name.rpartition(":")
    if folder and (files := saved_files(Path(folder).expanduser(), split)) is not None:
        return files
    found = HUB_ID.fullmatch(name)
    if found and kind_of(Path(found[1])) not in READERS and not Path(found[1]).parent.exists():
        return hub_files(*found.groups())
    remedy = "check the path (data.path); a hub data set is ORG/NAME or ORG/NAME:SPLIT"
    raise EagleError(f"{name}: no such data file; {remedy}")


def read_records(path: Path, data_format: str | None = None) -> Iterator[Record]:
    """Records of one file in order; what cannot be read as an object comes with its error. Of a
    document each line is a question, {"prompt": ...}, where `data_format` is chat or
    instruction."""
    try:
        kind = kind_of(path)
        if kind in READERS:
            yield from READERS[kind](path)
        else:
            yield from _read_document(path, data_format in ("chat", "instruction"))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> EagleError:
    reason = " ".join(str(getattr(error, "strerror", None) or repr(error)).split())[:200]
    return EagleError(f"{path}: cannot read this file: {reason}")


def _open(path: Path) -> BinaryIO:
    """The file's text as UTF-8 without a mark."""
    file = path.open("rb")
    if packing := PACKED.get(path.suffix.lower()):
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(file, compression=packing))
    head = file.peek(4)[:4]
    odd = head[:1] > b"\x7f" or b"\0\0" in (head[:2], head[::2], head[1::2])
    codec = json.detect_encoding(head) if odd else "utf-8"
    if codec in ("utf-8", "utf-8-sig"):
        file.read(3 * (codec == "utf-8-sig"))
        return file
    try:
        with file:
            return io.BytesIO(file.read().decode(codec).encode())
    except UnicodeDecodeError as error:
        raise EagleError(f"{path}: damaged {codec} at byte {error.start}; repair it") from error


def _read_lines(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
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
        return None, TOO_DEEP
    except ValueError:
        return None, TOO_LONG


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of objects; `line` is the item's number. JSONL under this name works too."""
    with _open(path) as file:
        data = file.read()
    try:
        items = json.loads(data.decode("utf-8"), parse_int=_integer)
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
        try:
            raw, error = json.dumps(item, ensure_ascii=False), None
        except RecursionError:
            raw, error = "", TOO_DEEP
        except TypeError:
            raw, error = "", TOO_LONG
        yield _record(path, number, item, error, raw)


def _integer(digits: str) -> Any:
    """The number; what is no JSON where it has more digits than Python reads."""
    try:
        return int(digits)
    except ValueError:
        return NotImplemented


def _read_table(path: Path) -> Iterator[Record]:
    """Text cells under the names of the header; in a .csv between `,`, `;` or tabs."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(_open(path), encoding="utf-8", errors="surrogateescape") as file:
        first, header = file.readline(), None
        delimiter = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=first.count)
        rows = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
        while True:
            place, cells, error = rows.line_num + 1, [], None
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as found:
                error = f"malformed CSV: {found}"
            if not (cells or error):
                continue
            if header is None:
                header = [name.strip() or "index" for name in cells]  # pandas' has no name
                if error or len(set(header)) < len(header):
                    remedy = "name each column once"
                    raise EagleError(f"{path}:{place}: {error or 'a name twice'}; {remedy}")
            else:
                value = dict(zip(header, cells, strict=False))
                raw = json.dumps(value, ensure_ascii=False)
                if not error and len(cells) != len(header):
                    error = f"malformed CSV: {len(cells)} cells, and {len(header)} in the header"
                elif re.search("[\udc80-\udcff]", raw):
                    error = "not UTF-8"
                yield _record(path, place, value, error, raw)


def _read_columns(path: Path) -> Iterator[Record]:
    """Parquet, or Arrow as the `datasets` library writes it. Cells that are null are absent; dates
    and the like are text."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        if kind_of(path) == ".parquet":
            batches = ParquetFile(path).iter_batches(batch_size=1000)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        # a damaged Arrow file has no check sum
        rows = (batch.validate(full=True) or batch.to_pylist() for batch in batches)
        for number, item in enumerate(itertools.chain.from_iterable(rows), 1):
            value = {key: cell for key, cell in item.items() if cell is not None}
            raw = json.dumps(value, ensure_ascii=False, default=_as_text)
            yield _record(path, number, json.loads(raw), None, raw)
    except (pyarrow.ArrowException, ValueError) as error:
        name, reason = kind_of(path)[1:].capitalize(), " ".join(str(error).split())[:200]
        raise EagleError(f"{path}: not a readable {name} file: {reason}") from error


def _as_text(cell: Any) -> str:
    return cell.decode() if isinstance(cell, bytes) else str(cell)


def _read_document(path: Path, questions: bool) -> Iterator[Record]:
    with io.TextIOWrapper(_open(path), encoding="utf-8") as file:
        try:
            text = file.read()
        except UnicodeDecodeError:
            yield _record(path, 1, None, "not UTF-8", "")
            return
    found = [(1, {"text": text})]
    if questions:
        lines = enumerate(text.split("\n"), 1)
        found = [(number, {"prompt": line.strip()}) for number, line in lines if line.strip()]
    for number, value in found:
        yield _record(path, number, value, None, json.dumps(value, ensure_ascii=False))


READERS = dict.fromkeys((".jsonl", ".ndjson"), _read_lines) | {".json": _read_json}
READERS |= dict.fromkeys((".csv", ".tsv"), _read_table)
READERS |= dict.fromkeys((".parquet", ".arrow"), _read_columns)


def _record(path: Path, number: int, value: Any, error: str | None, raw: str) -> Record:
    if error is None and not isinstance(value, dict):
        error = f"not a JSON object but {type(value).__name__}"
    elif error is None and raw.count("{") + raw.count("[") > DEEPEST and not _fits(value, DEEPEST):
        error = TOO_DEEP
    raw = raw.encode(
        "utf-8", "backslashreplace"
    ).decode()  # half characters are escapes, as in JSON
    return Record(str(path), number, None if error else value, error, raw)


def _fits(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_fits(v, levels - 1) for v in inside if isinstance(v, (dict, list)))
