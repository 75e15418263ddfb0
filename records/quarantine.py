"""Rejected rows: named by file and line, counted, written down, and never too many in silence."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import RowsConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.rows import RowError
from records.sources import Record, read_records

logger = logging.getLogger("records")
RAW_LIMIT = 2000


class BadRow(NamedTuple):
    """`reason` groups alike rows; `message` is the reason with this row's details."""

    file: str
    line: int
    reason: str
    message: str
    remedy: str
    raw: str

    @classmethod
    def of(cls, record: Record, error: RowError) -> BadRow:
        place, raw = (record.file, record.line), record.raw[:RAW_LIMIT]
        return cls(*place, error.reason, str(error), error.remedy, raw)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def object_of(record: Record) -> dict:
    """What was read. Raises RowError where that is no object, or text that no tokenizer takes."""
    if record.value is None:
        reason, _, detail = str(record.error).partition(": ")
        raise RowError(reason, "repair or remove this line", detail)
    if "\\u" in record.raw:  # where alone halves can come from
        try:
            json.dumps(record.value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError("half a character (a lone surrogate)", "repair this line") from error
    return record.value


def read_rows(
    files: list[Path],
    render: Callable[[dict], list],
    cfg: RowsConfig,
    kind: str = "preference",
    most: int | None = None,
) -> tuple[list[Any], list[BadRow], int]:
    """(rows, records that `render` refuses, records read) of files, `most` of each; warns of fields
    that the first row of a record names as `unused`, or refuses with cfg.strict."""
    rows, bad, records = [], [], 0
    for path in files:
        unused: Counter[str] = Counter()
        for record in islice(read_records(path), most):
            records += 1
            try:
                found = render(object_of(record))
                if cfg.strict:
                    refuse(found[0].unused, kind)
                unused.update(found[0].unused)
                rows += found
            except RowError as error:
                bad.append(BadRow.of(record, error))
        name_unused(unused, path, kind)
    return rows, bad, records


def refuse(unused: tuple[str, ...], data_format: str) -> None:
    """Of `data.strict`."""
    if unused:
        what = f"fields that {data_format} does not use: {', '.join(unused)}"
        raise RowError(what, "remove or rename them, or set data.strict=false")


def write_quarantine(bad: list[BadRow], path: Path) -> None:
    """One JSON object per rejected row; a lone surrogate as the JSON escape that it came as."""
    rows = ({**row._asdict(), "where": row.where} for row in bad)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, text.encode("utf-8", "backslashreplace").decode())


def diagnose(bad: list[BadRow], top: int = 3) -> str:
    """The commonest reasons with their counts, first example and remedy, on one line."""
    counts, parts = Counter(row.reason for row in bad), []
    for reason, count in counts.most_common(top):
        first = next(row for row in bad if row.reason == reason)
        parts.append(f"{count} x {reason} [first: {first.where}: {first.message}; {first.remedy}]")
    return "; ".join(parts) + (f"; {len(counts)} reasons in all" if len(counts) > top else "")


def enforce(bad: list[BadRow], records: int, max_bad_fraction: float, out: Path | None) -> None:
    """Raise when there is nothing to read, when all rows are bad, or too many are."""
    if records == 0:
        raise EagleError("the data set is empty: put at least one row into it (data.path)")
    written = f"; all are in {out}" if out else ""
    if len(bad) == records:
        raise EagleError(f"all {records} rows are unusable: {diagnose(bad)}{written}")
    if len(bad) > max_bad_fraction * records:
        raise EagleError(
            f"{len(bad)} of {records} rows are unusable, more than data.max_bad_fraction="
            f"{max_bad_fraction:g}: {diagnose(bad)}; repair them or raise the limit{written}"
        )


def name_unused(counts: Counter[str], file: Any, data_format: str) -> None:
    """Warn, once a file, of fields that its records have and that were not used."""
    if counts:
        named = ", ".join(f"{name} ({n} rows)" for name, n in counts.most_common())
        said = "%s: %s does not use the fields %s; remove or rename them"
        logger.warning(said, file, data_format, named)
