"""Files of records that are rendered one by one, and what becomes of the bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from configs.finetune_schema import PreferenceData, TaskData
from records.quarantine import BadRow, enforce, write_quarantine
from records.rows import RowError
from records.sources import read_records


def each_record(
    files: list[Path],
    cfg: PreferenceData | TaskData,
    out: Path | None,
    take: Callable[[dict], None],
) -> dict:
    """Give `take` each record; those that it refuses (RowError) go to `out` and above
    `max_bad_fraction` end the run. Returns what was counted."""
    bad: list[BadRow] = []
    records = 0
    for path in files:
        for number, record in enumerate(read_records(path)):
            if cfg.max_rows is not None and number >= cfg.max_rows:
                break
            records += 1
            try:
                if record.value is None:
                    raise RowError(str(record.error).split(":")[0], "repair or remove this line")
                take(record.value)
            except RowError as error:
                bad.append(
                    BadRow(
                        record.file, record.line, error.reason, str(error), error.remedy, record.raw
                    )
                )
    if out is not None and bad:
        write_quarantine(bad, out)
    enforce(bad, records, cfg.max_bad_fraction, out if bad else None)
    return {
        "files": [path.name for path in files],
        "records": records,
        "bad": len(bad),
        "bad_by_reason": dict(Counter(row.reason for row in bad)),
    }
