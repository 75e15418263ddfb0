"""Rejected rows: named by file and line, counted, written down, and never too many in silence."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.rows import RowError
from records.sources import Record

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
    """What was read. Raises RowError where that is no object."""
    if record.value is None:
        reason, _, detail = str(record.error).partition(": ")
        raise RowError(reason, "repair or remove this line", detail)
    return record.value


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
        said = "%s: %s does not use the fields %s; remove or rename them (data.strict=true refuses)"
        logger.warning(said, file, data_format, named)
