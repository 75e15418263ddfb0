"""Ctrl-C and SIGTERM as a number that is looked at between steps."""

from __future__ import annotations

import signal
import threading


class StopSignals:
    """While entered, the first signal is kept in `number` (0: none), a second one ends the run at
    once.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {s: signal.signal(s, self._stop) for s in self.CAUGHT}
        return self

    def __exit__(self, *error) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _stop(self, number, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
