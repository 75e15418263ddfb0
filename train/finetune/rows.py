"""Records of pairs or of tasks -> rows, training and held out, and what becomes of the bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from configs.finetune_schema import TaskData
from eagle.errors import EagleError
from records.dataset import held_out_rows
from records.quarantine import BadRow, enforce, write_quarantine
from records.rows import RowError
from records.sources import read_records, resolve
from train.finetune.assistant import shipped_file
from train.finetune.run import Run

Render = Callable[[dict], list]  # a record's rows, each with the `key` of its record


def load_rows(run: Run, kind: str, render: Render) -> tuple[list, list, dict]:
    """Rows for training, rows held out, and the data card; without files, of the shipped `kind`."""
    cfg: TaskData = run.cfg.data

    def read(given: list[str] | None, split: str, most: int | None) -> tuple[list, dict]:
        files = resolve(given) if given else [shipped_file(cfg, kind, split)]
        return read_rows(files, render, cfg.max_bad_fraction, run.quarantine(split), most)

    rows, card = read(cfg.paths, "train", cfg.max_rows)
    if cfg.eval_paths or not cfg.paths:
        heldout, _ = read(cfg.eval_paths, "eval", cfg.max_eval_rows)
    else:
        rows, heldout = split_rows(rows, cfg.heldout_fraction)
    if not rows or not heldout:
        raise EagleError(
            f"{len(rows)} rows are left to train on and {len(heldout)} held out: add data, or "
            "change data.heldout_fraction"
        )
    return rows, heldout, {**card, "rows": len(rows), "heldout_rows": len(heldout)}


def split_rows(rows: list, fraction: float) -> tuple[list, list]:
    """(training, held out): all rows of a record are on one side."""
    held = held_out_rows(np.array([row.key for row in rows]), fraction)
    sides: tuple[list, list] = ([], [])
    for row, out in zip(rows, held, strict=True):
        sides[int(out)].append(row)
    return sides


def read_rows(
    files: list[Path],
    render: Render,
    max_bad_fraction: float,
    out: Path | None,
    most: int | None = None,
) -> tuple[list[Any], dict]:
    """The rows of up to `most` records a file, and what was counted. Records that `render` refuses
    (RowError) go to `out` and above `max_bad_fraction` end the run."""
    rows: list[Any] = []
    bad: list[BadRow] = []
    records = 0
    for path in files:
        for record in islice(read_records(path), most):
            records += 1
            try:
                if record.value is None:
                    raise RowError(str(record.error).split(":")[0], "repair or remove this line")
                rows += render(record.value)
            except RowError as error:
                told = (error.reason, str(error), error.remedy)
                bad.append(BadRow(record.file, record.line, *told, record.raw))
    if out is not None and bad:
        write_quarantine(bad, out)
    enforce(bad, records, max_bad_fraction, out if bad else None)
    return rows, {
        "files": [path.name for path in files],
        "records": records,
        "bad": len(bad),
        "bad_by_reason": dict(Counter(row.reason for row in bad)),
    }
