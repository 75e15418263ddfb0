"""What every subject of the bench leaves: where it was measured, what was asked, a row a
measurement.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eagle.checkpoint import atomic_write_text
from inference.bench.environment import describe, load
from inference.bench.report import Section, markdown, terminal

# files of the person who ran it, or where results went: they do not reproduce anything
UNREPORTED = ("json", "report", "plots", "quiet", "out")
MEASURED = ("device",)  # the record has what was found


@dataclass
class Record:
    """settings: what was asked. runs: one row a measurement. command: what to type for the same."""

    device: torch.device
    settings: dict
    command: str
    runs: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = describe(self.device)

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


def record_of(subject: str, function: Callable, asked: dict, device: torch.device) -> Record:
    """asked: the function's arguments as they were given."""
    settings = {
        name: portable(value) if isinstance(value, str) else value
        for name, value in asked.items()
        if name not in (*UNREPORTED, *MEASURED)
    }
    return Record(device, settings, command_line(subject, function, asked))


def command_line(subject: str, function: Callable, asked: dict) -> str:
    """What to type for the same measurement. Of a path on this machine only the last part is
    told.
    """
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


def require_files(*files: str | None) -> None:
    """Refuse what could not be written, before the work is done."""
    from inference.generate import require_writable

    for file in files:
        if file is not None:
            require_writable(Path(file))


def hand_over(
    result: dict,
    title: str,
    sections: list[Section],
    json_file: str | None,
    report: str | None = None,
    quiet: bool = False,
) -> None:
    """Print the first section and, as the last line, the JSON; keep what was asked for."""
    if not quiet:
        print(terminal(title, sections[0]))
    line = json.dumps(result)
    for file, text in ((json_file, line + "\n"), (report, markdown(title, result, sections))):
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, text)
    print(line)
