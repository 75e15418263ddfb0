"""Checkpoints of a run: written beside their place and moved into it whole.

OUTPUT/checkpoints/checkpoint-N/   an adapter folder, and the trainer's optimizer, schedule and
                                   generators
OUTPUT/checkpoints/.*              what is being written or removed, or a kill left behind
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
STATE = "trainer_state.json"


def folder_of(output: Path) -> Path:
    return output / "checkpoints"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder_of(output).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    whole = [path for path in found if (path / STATE).exists() and (path / RECORD).exists()]
    return sorted(whole, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def clear(output: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for stale in folder_of(output).glob(".*"):
        shutil.rmtree(stale, ignore_errors=True)


def prune(output: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for path in checkpoints(output)[:-keep]:
        if path.name != best:
            going = path.with_name(f".{path.name}")
            os.rename(path, going)  # a kill leaves no half of it under its name
            shutil.rmtree(going, ignore_errors=True)


def find(output: Path, resume: str) -> Path | None:
    """`auto`: the newest checkpoint of the run, None when there is none; else the folder named."""
    path = output if resume == "auto" else Path(resume).expanduser()
    if NAME.fullmatch(path.name) and (path / STATE).exists():
        return path
    found = checkpoints(path)
    if not found and resume != "auto":
        raise EagleError(
            f"--resume {path}: no checkpoint there; give a run folder or one of its checkpoint-N "
            "folders"
        )
    return found[-1] if found else None


def step_of(path: Path) -> int:
    return json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"]


def require_same_run(path: Path, identity: dict) -> None:
    """A resumed run must have the base, adapter, data and arithmetic it began with; learning
    settings may change."""
    record = read_record(path)
    before = record | record.get("identity", {})
    for key, value in identity.items():
        if before.get(key) != value:
            raise EagleError(
                f"{path} belongs to a run with {key}={before.get(key)!r}, this one has {value!r}; "
                "resume with the settings of that run, or start a new one with another --output"
            )
