"""A recipe of commands that can be interrupted: what is done is not done again, unless what it read
changed.

    OUTPUT/stages/NAME.json   fingerprint of the command and its inputs, seconds it took, whether it
    is done OUTPUT/logs/NAME.log      what the command wrote

Knows commands and files; knows nothing of what the commands do.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from inference.generate import write_text

BY_CONTENT = 64 << 20  # bytes; a larger file is told by its size and time


@dataclass(frozen=True)
class Stage:
    """`python *command` reads `inputs` and writes `outputs`, files or folders.

    resume: arguments that let the command go on where an interruption left it; None: it begins
    again.
    """

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    resume: tuple[str, ...] | None = None

    def fingerprint(self) -> str:
        read = {str(path): digest(path) for path in self.inputs}
        text = json.dumps([self.command, read], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Runner:
    """Runs stages in one folder, telling what happens on stderr."""

    def __init__(self, output: Path, total: int) -> None:
        from rich.console import Console

        self.output, self.total, self.number = output, total, 0
        self.console = Console(stderr=True)
        self.spent: dict[str, dict[str, float]] = {}
        self.child: subprocess.Popen | None = None

    def run(self, stage: Stage) -> int:
        """The exit code; 0 at once for a stage that is done."""
        self.number += 1
        mark = self.output / "stages" / f"{stage.name}.json"
        fingerprint = stage.fingerprint()
        before = read_mark(mark)
        there = all(path.exists() for path in stage.outputs)
        same = before.get("fingerprint") == fingerprint
        self.console.rule(f"{self.number}/{self.total} {stage.title}")
        if same and before.get("done") and there:
            self.spent[stage.name] = before["spent"]
            self.say(f"done before, in {before['spent']['seconds']:.0f} s")
            return 0
        words, spent = list(stage.command), {"seconds": 0.0, "cpu_seconds": 0.0}
        if same and not before.get("done") and stage.resume is not None:
            words, spent = [*words, *stage.resume], before["spent"]
        else:
            for path in stage.outputs:
                remove(path)
        self.say("$ " + " ".join(("python", *words)), bold=True)

        def note(done: bool) -> None:
            took = {name: value - started[name] for name, value in clocks().items()}
            self.spent[stage.name] = {name: spent[name] + value for name, value in took.items()}
            record = {
                "fingerprint": fingerprint,
                "done": done,
                "command": ["python", *stage.command],
                "spent": self.spent[stage.name],
            }
            write_text(mark, json.dumps(record, indent=2) + "\n")

        started = clocks()
        note(False)
        code = self.call(words, self.output / "logs" / f"{stage.name}.log")
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if code == 0 and missing:
            self.say(f"error: {stage.name} ended without writing {', '.join(missing)}")
            code = 1
        note(code == 0)
        if code:
            self.say(f"{stage.name} ended with {code}; the same command goes on from here")
        return code

    def call(self, words: list[str], log: Path) -> int:
        """Run it to its end; what it writes goes to the log, and what it says on stderr to ours
        too. Ctrl-C reaches it too and SIGTERM is passed on, so that it can save."""
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = signal.signal(signal.SIGTERM, lambda number, frame: self.child.terminate())
        try:
            with open(log, "ab", buffering=0) as file:
                file.truncate(0)
                self.child = subprocess.Popen(
                    [sys.executable, *words], stdout=file, stderr=subprocess.PIPE
                )
                telling = threading.Thread(target=tell, args=(self.child.stderr, file))
                telling.start()
                while True:
                    try:
                        code = self.child.wait()
                        telling.join()
                        break
                    except KeyboardInterrupt:
                        continue
        finally:
            signal.signal(signal.SIGTERM, kept)
        return code if code >= 0 else 128 - code

    def say(self, text: str, bold: bool = False) -> None:
        self.console.print(
            text, style="bold" if bold else None, markup=False, highlight=False, soft_wrap=True
        )


def tell(lines: IO[bytes], log: IO[bytes]) -> None:
    """Each line as it comes, into the log and on stderr."""
    for line in lines:
        log.write(line)
        sys.stderr.write(line.decode("utf-8", "replace"))
        sys.stderr.flush()


def clocks() -> dict[str, float]:
    """Of the wall, and of the processors in all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": time.monotonic(), "cpu_seconds": used.ru_utime + used.ru_stime}


def read_mark(path: Path) -> dict:
    """{} for a stage that never began, or whose mark cannot be read: then it is done again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str | None:
    """Of a file's content, or of a folder's files; None for what is not there."""
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file())
        return _hash(f"{p.relative_to(path)} {digest(p)}" for p in names)
    if not path.is_file():
        return None
    found = os.stat(path)
    if found.st_size > BY_CONTENT:
        return f"{found.st_size} bytes of {found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(lines) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
