"""How far a long job is: a line kept up to date on a terminal, elsewhere one every half minute."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.markup import escape

EVERY = 30.0  # seconds between lines where there is no terminal


class Bar:
    """Told of a job by `show`, and of what it is at between two of those by `doing`."""

    def __init__(self, quiet: bool = False, every: float = EVERY) -> None:
        self.quiet, self.every = quiet, every
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.status = self.console.status("")
        self.line, self.began = "", 0.0
        self.ticking: threading.Event | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def show(self, count: str, fraction: float | None, text: str, now: bool = False) -> None:
        """fraction: 0 … 1 of the job, None where that is not known. now: without a terminal, write
        it at once."""
        share = "" if fraction is None else f" {100 * min(fraction, 1):3.0f}%"
        self._say(f"{count}{share}  {text}", 0.0)
        if now and not (self.quiet or self.live):
            self._write()

    def doing(self, what: str) -> None:
        """What takes the time now, where nothing can be counted; shown with its time."""
        self._say(what, time.monotonic())

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.ticking:
            self.ticking.set()
        self.status.stop()
        self.ticking = None

    def _say(self, line: str, began: float) -> None:
        self.line, self.began = line, began
        if self.quiet:
            return
        if self.live:
            self.status.update(escape(line))
            self.status.start()
        elif self.ticking is None:
            self.ticking = stop = threading.Event()

            def write() -> None:
                while not stop.wait(self.every):
                    self._write()

            threading.Thread(target=write, daemon=True).start()

    def _write(self) -> None:
        spent = f"  {clock(time.monotonic() - self.began)}" if self.began else ""
        print(self.line + spent, file=sys.stderr, flush=True)


class Meter(Bar):
    """`done` of `total` things, with a rate of what costs time (`unit`, tokens mostly). Rate and
    ETA are of this process: what was done before, `done` at the start, does not count."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "tokens",
        done: int = 0,
        every: float = EVERY,
        quiet: bool = False,
    ) -> None:
        super().__init__(quiet, every)
        self.name, self.total, self.unit = name, total, unit
        self.before, self.done, self.amount = done, done, 0
        self.started = time.monotonic()
        self.add(0)

    def add(self, things: int, amount: int = 0) -> None:
        self.done += things
        self.amount += amount
        count = f"{self.name} {self.done}/{self.total}"
        finished = things > 0 and self.done >= self.total > 0
        self.show(count, self.done / max(self.total, 1), self.text(time.monotonic()), now=finished)

    def text(self, now: float) -> str:
        seconds = max(now - self.started, 1e-9)
        share = (self.done - self.before) / max(self.total - self.before, 1)
        return f"{self.amount / seconds:.0f} {self.unit}/s  ETA {remaining(seconds, share)}"


def remaining(seconds: float, share: float) -> str:
    """Of a job of which `share` has taken `seconds`."""
    return clock(seconds * (1 - share) / share) if share > 0 else "?"


def clock(seconds: float) -> str:
    seconds = int(max(seconds, 0))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
