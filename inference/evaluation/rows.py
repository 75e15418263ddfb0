"""Rows of a data file through a reader, and those that it refuses: listed, and never too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from eagle.errors import EagleError
from records.sources import read_records, resolve


def read_rows(
    path: str | Path, reader: Callable[[dict, int], object], max_bad_fraction: float
) -> tuple[list, list[dict]]:
    """What `reader(row, place)` makes of the rows, and {"row", "reason"} of those where it raises
    ValueError."""
    rows, bad = [], []
    for file in resolve([path]):
        for record in read_records(file):
            try:
                if record.value is None:
                    raise ValueError(record.error)
                rows.append(reader(record.value, len(rows) + len(bad)))
            except ValueError as error:
                bad.append({"row": f"{record.file}:{record.line}", "reason": reason(error)})
    count = len(rows) + len(bad)
    if not count:
        raise EagleError(f"{path} has no rows; one JSON object a line")
    if len(bad) > max_bad_fraction * count:
        raise EagleError(
            f"{len(bad)} of {count} rows cannot be used, first {bad[0]['row']}: "
            f"{bad[0]['reason']}; repair them, or raise --max_bad_fraction "
            f"(now {max_bad_fraction:g})"
        )
    return rows, bad


def reason(error: ValueError) -> str:
    """In one line; of pydantic's complaints the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
