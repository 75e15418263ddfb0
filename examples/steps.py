"""Commands in a row, each shown before it runs; one that is done is not done again unless it, or a
file that it names, has changed.

    FOLDER/stages/NAME.json   the command, its files, the seconds it took, whether it is done
    FOLDER/logs/NAME.log      what it wrote to stdout
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from eagle.files import atomic_write_text


def words(command: str, *more: str, **flags: Any) -> list[str]:
    """("train.main", head="x", adapter=None) -> ["train.main", "--head", "x"]"""
    given = [(f"--{name}", str(value)) for name, value in flags.items() if value is not None]
    return [*command.split(), *(word for pair in given for word in pair), *more]


def call(command: list[str], log: Path | None = None) -> int:
    """Run `python -m COMMAND` to its end and return its exit code. Ctrl-C reaches it too and
    SIGTERM is passed on, so that it can save. log: what takes its stdout."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    stdout = None if log is None else log.open("wb")
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=stdout)
    kept = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                code = child.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, kept)


def write_once(path: Path, text: str) -> Path:
    """Leaves a file that holds `text` already as it is, its time too."""
    if not path.exists() or path.read_text("utf-8") != text:
        atomic_write_text(path, text)
    return path


class Steps:
    """Steps in one folder. `spent`: seconds of each, earlier starts included."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.console = folder, Console(stderr=True, highlight=False, soft_wrap=True)
        self.spent: dict[str, float] = {}

    def run(
        self, name: str, command: list[str], *outputs: Path, resume: list | None = None
    ) -> None:
        """Exits with the command's code where that is not 0. outputs: files or folders that it
        writes; resume: words with which it goes on after an interruption, None: it begins again."""
        self.console.rule(name)
        mark = self.folder / "stages" / f"{name}.json"
        state = {"command": command, "inputs": inputs_of(command, outputs)}
        try:
            before = json.loads(mark.read_text("utf-8"))
        except (OSError, ValueError):  # it never began, or its mark is torn
            before = {}
        same = state.items() <= before.items()
        if same and before["done"] and all(path.exists() for path in outputs):
            self.spent[name] = before["seconds"]
            self.console.print(f"done before, in {self.spent[name]:.0f} s")
            return
        started = time.monotonic()
        if same and not before["done"] and resume is not None:
            command = [*command, *resume]
            started -= before["seconds"]
        else:
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

        def note(done: bool) -> None:
            self.spent[name] = time.monotonic() - started
            mine = {**state, "seconds": self.spent[name], "done": done}
            atomic_write_text(mark, json.dumps(mine, indent=1) + "\n")

        note(False)
        self.console.print(f"$ python -m {' '.join(command)}", markup=False)
        code = call(command, self.folder / "logs" / f"{name}.log")
        note(code == 0)
        if code:
            self.console.print(f"{name} ended with {code}; the same command goes on from here")
            raise SystemExit(code)


def inputs_of(command: list[str], outputs: tuple[Path, ...]) -> dict[str, list]:
    """Size and time of each file that a command names, or that is in a folder that it names."""
    found = {}
    for word in command:
        path = Path(word.rpartition("=")[2])
        if path in (Path(), *outputs) or not path.exists():
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found[str(file)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return found
