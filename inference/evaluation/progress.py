"""One line of progress for work that overlaps: how much of each part is done, how fast, and how
long it may take.
"""

from __future__ import annotations

import sys
import threading
import time

EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Parts by name; `step` may be called from any thread. Writes to standard error."""

    def __init__(self, **totals: int) -> None:
        self.totals = {name: total for name, total in totals.items() if total}
        self.done = dict.fromkeys(self.totals, 0)
        self.skipped = dict.fromkeys(self.totals, 0)  # was there already: no measure of speed
        self.tokens = 0
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self._lock = threading.Lock()

    def step(self, name: str, tokens: int | None = None, skipped: bool = False) -> None:
        with self._lock:
            self.done[name] += 1
            self.skipped[name] += skipped
            self.tokens += tokens or 0
            now = time.monotonic()
            if now - self.shown > (0.2 if self.live else EVERY):
                self.shown = now
                self._write()

    def line(self) -> str:
        spent = max(time.monotonic() - self.started, 1e-9)
        parts = []
        for name, total in self.totals.items():
            done, fresh = self.done[name], self.done[name] - self.skipped[name]
            rate = fresh / spent
            text = f"{name} {done}/{total}, {rate:.2f}/s"
            if rate and done < total:
                text += f", about {clock((total - done) / rate)} left"
            parts.append(text)
        if self.tokens:
            parts.append(f"{self.tokens / spent:.0f} tokens/s")
        return "; ".join(parts)

    def _write(self) -> None:
        text = f"\r\033[K{self.line()}" if self.live else f"{self.line()}\n"
        sys.stderr.write(text)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._write()
            if self.live:
                sys.stderr.write("\n")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
