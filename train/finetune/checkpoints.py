"""Checkpoints of a run: written beside their place and moved into it whole.

    OUTPUT/checkpoints/checkpoint-N/   the adapter folder, and the trainer's optimizer, schedule and
    generators OUTPUT/checkpoints/.saving/        one that is being written, or that a kill left
    behind

A folder that bears its name is complete. Knows nothing of what is in it beyond
`trainer_state.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from eagle.errors import EagleError
from eagle.loading import RECORD, read_record

NAME = re.compile(r"checkpoint-(\d+)")
SAVING = ".saving"
STATE = "trainer_state.json"


def folder_of(output: Path) -> Path:
    return output / "checkpoints"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folder = folder_of(output)
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found) if (p / STATE).exists() and (p / RECORD).exists()]


def clear(output: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    folder = folder_of(output)
    for stale in list(folder.glob(f"{SAVING}*")) if folder.is_dir() else []:
        shutil.rmtree(stale, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Sync every file of `staged`, then give it its name. `final` must not be there, or is
    replaced.
    """
    for item in [*sorted(staged.rglob("*")), staged]:
        _sync(item)
    if final.exists():
        _remove(final)
    os.rename(staged, final)
    _sync(final.parent)


def prune(output: Path, keep: int, best: Path | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for path in checkpoints(output)[:-keep]:
        if best is None or path.name != best.name:
            _remove(path)


def find(output: Path, resume: str) -> Path | None:
    """`auto`: the newest checkpoint of the run, None when there is none; else the folder named."""
    if resume == "auto":
        found = checkpoints(output)
        return found[-1] if found else None
    path = Path(resume).expanduser()
    if NAME.fullmatch(path.name) and (path / STATE).exists():
        return path
    found = checkpoints(path)
    if not found:
        raise EagleError(
            f"--resume {path}: no checkpoint there; give a run folder or one of its checkpoint-N folders"
        )
    return found[-1]


def step_of(path: Path) -> int:
    return json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"]


def require_same_run(path: Path, identity: dict) -> None:
    """A resumed run must have the base, adapter and data it began with; learning settings may
    change.
    """
    before = read_record(path).get("identity", {})
    changed = [k for k in identity if before.get(k) != identity[k]]
    if changed:
        key = changed[0]
        raise EagleError(
            f"{path} belongs to a run with {key}={before.get(key)!r}, this one has {identity[key]!r}; "
            "resume with the settings of that run, or start a new one with another --output"
        )


def _remove(path: Path) -> None:
    """Take its name away first, so that a kill leaves no half of it under that name."""
    doomed = path.with_name(f"{SAVING}-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
