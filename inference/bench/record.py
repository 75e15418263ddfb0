"""What every subject of the bench leaves: where it was measured, what was asked, a row a
measurement; one JSON object, one table for the terminal, one page.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from inference.bench.environment import describe, load
from inference.bench.report import Section, markdown, terminal
from inference.bench.timing import say

# files of the person who ran it, or where results went: they do not reproduce anything
UNREPORTED = ("json", "report", "plots", "quiet", "out")


@dataclass
class Record:
    """settings: what was asked. runs: one row a measurement. command: what to type for the same.

    file: where the record is kept after each `attempt`.
    """

    device: torch.device
    settings: dict = field(default_factory=dict)
    command: str = ""
    runs: list[dict] = field(default_factory=list)
    file: Path | None = None

    def __post_init__(self) -> None:
        self.environment = describe(self.device)
        self.started = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    def result(self, **summary) -> dict:
        """The JSON object; summary: what follows from the rows."""
        where = {**self.environment, "load_end": load()}
        return {
            "device": where["accelerator"] or where["cpu"],
            "threads": where["threads"],
            "versions": where["versions"],
            "environment": where,
            **self.settings,
            "runs": self.runs,
            **summary,
            "command": self.command,
        }

    def attempt(self, kind: str, settings: dict, work: Callable[[], dict]) -> dict:
        """Add a row: what `work` returned, or its error; and keep the record so far."""
        row, started = {"kind": kind, **settings}, self.spent
        try:
            row |= work()
        except Exception as error:  # it says so, and the others go on
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        row["seconds"] = round(self.spent - started, 3)
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a device that an error has ended
                torch.cuda.empty_cache()
        self.runs.append(row)
        told = " ".join(f"{name}={value}" for name, value in settings.items())
        say(f"[{self.spent:6.1f} s] {kind} {told} {row.get('error', '')}")
        if self.file is not None:
            atomic_write_text(self.file, json.dumps(self.result(), indent=1) + "\n")
        return row


def record_of(subject: str, function: Callable, asked: dict, device: torch.device) -> Record:
    """asked: the function's arguments as they were given."""
    settings = {
        name: portable(value) if isinstance(value, str) else value
        for name, value in asked.items()
        if name not in (*UNREPORTED, "device")  # the record has the one that was found
    }
    return Record(device, settings, command_line(subject, function, asked))


def command_line(subject: str, function: Callable, asked: dict) -> str:
    """What to type for the same. Of a path on this machine only the last part is told."""
    threads = os.environ.get("OMP_NUM_THREADS")
    words = [f"OMP_NUM_THREADS={threads}"] if threads else []
    words += ["python", "-m", "inference.bench", *([subject] if subject else [])]
    for name, default in function.__kwdefaults__.items():
        if asked.get(name, default) != default and name not in UNREPORTED:
            words += [f"--{name}", portable(str(asked[name]))]
    return shlex.join([*words, *asked.get("overrides", ())])


def portable(text: str) -> str:
    """Of a path that leads out of the working folder, its last part; anything else as it is."""
    outside = Path(text).is_absolute() or ".." in Path(text).parts or text.startswith("~")
    return Path(text).name if outside else text


def require(asked: dict, *counts: str) -> None:
    """Refuse before the work is done: counts below 1, and files that could not be written."""
    from inference.generate import require_writable

    for name in counts:
        if asked[name] < 1:
            raise EagleError(f"{name} must be at least 1, not {asked[name]}")
    for name in ("json", "report"):
        if asked.get(name) is not None:
            require_writable(Path(asked[name]))


def hand_over(result: dict, title: str, sections: list[Section], asked: dict) -> None:
    """Print the first section and, as the last line, the JSON; keep what was asked for."""
    if not asked.get("quiet"):
        print(terminal(title, sections[0]))
    line = json.dumps(result)
    for name, text in (("json", line + "\n"), ("report", markdown(title, result, sections))):
        if asked.get(name) is not None:
            atomic_write_text(asked[name], text)
    print(line)
