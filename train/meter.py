"""How far a long job is: a bar on a terminal, a plain line now and then elsewhere.

Knows counts; knows nothing of what is counted.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Meter:
    """`done` of `total` things, with a rate of what costs the time (`unit`, tokens mostly).

    Rate and ETA are of this process: what was done before, `done` at the start, does not count.
    """

    def __init__(
        self, name: str, total: int, unit: str = "tokens", done: int = 0, every: float = 10.0,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.total, self.unit, self.every, self.quiet = name, total, unit, every, quiet
        self.before, self.done, self.amount = done, done, 0
        self.started = self.shown = time.monotonic()
        console = Console(stderr=True, highlight=False)
        self.bar = None
        if console.is_terminal and not console.is_dumb_terminal and not quiet:
            columns = (
                TextColumn(name), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> Meter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def add(self, things: int, amount: int = 0) -> None:
        self.done += things
        self.amount += amount
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=self.text(now))
        elif not self.quiet and (now - self.shown >= self.every or self.done >= self.total > 0):
            self.shown = now
            print(
                f"{self.name} {self.done}/{self.total}  {self.text(now)}",
                file=sys.stderr,
                flush=True,
            )

    def text(self, now: float) -> str:
        seconds = max(now - self.started, 1e-9)
        share = (self.done - self.before) / max(self.total - self.before, 1)
        left = int(seconds * (1 - share) / share) if share else 0
        ETA = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}" if share else "?"
        return f"{self.amount / seconds:.0f} {self.unit}/s  ETA {ETA}"
