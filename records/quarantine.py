"""Rejected rows: named by file and line, counted, written down, and never too many in silence."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from eagle.errors import EagleError

RAW_LIMIT = 2000


class BadRow(NamedTuple):
    """`reason` groups alike rows; `message` is the reason with this row's details."""

    file: str
    line: int
    reason: str
    message: str
    remedy: str
    raw: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def write_quarantine(bad: list[BadRow], path: Path) -> None:
    """One JSON object per rejected row; the file appears whole or not at all."""
    lines = []
    for row in bad:
        entry = row._asdict() | {"where": row.where, "raw": row.raw[:RAW_LIMIT]}
        lines.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    write_atomic(path, b"".join(lines))


def read_quarantine(path: Path) -> list[BadRow]:
    with path.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return [BadRow(*(entry[field] for field in BadRow._fields)) for entry in entries]


def write_atomic(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def diagnose(bad: list[BadRow], top: int = 3) -> str:
    """The commonest reasons with their counts, first example and remedy, on one line."""
    counts = Counter(row.reason for row in bad)
    parts = []
    for reason, count in counts.most_common(top):
        first = next(row for row in bad if row.reason == reason)
        parts.append(f"{count} x {reason} [first: {first.where}: {first.message}; {first.remedy}]")
    rest = len(counts) - top
    return "; ".join(parts) + (f"; and {rest} more reasons" if rest > 0 else "")


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
