"""A file of JSON lines that only grows, and that a kill or a full disk cannot spoil.

A line is there whole or not at all: what a kill left of the last one is cut off when the file is
opened again, and a write that fails is taken back. One process at a time may have it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from eagle.errors import EagleError

SYNC_SECONDS = 2.0


class Journal(contextlib.AbstractContextManager):
    """`records` holds what was in the file when it was opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: a record that `append` has returned from survives a kill of this process
            self._file = open(self.path, "a+b", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = isinstance(error, BlockingIOError)
            why = "another run is writing to it" if busy else error.strerror
            message = f"{self.path} cannot be written ({why}); choose another --output"
            raise EagleError(message) from error
        self._file.seek(0)
        data = self._file.read()
        self.records, self._size = parse(data, self.path), data.rfind(b"\n") + 1
        self._file.truncate(self._size)
        self._synced = time.monotonic()

    def append(self, record: dict) -> None:
        """Raises EagleError when the disk is full; the file is then as it was before."""
        rest = line = json.dumps(record).encode() + b"\n"
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._file.truncate(self._size)
            raise EagleError(
                f"{self.path} cannot be written ({error.strerror}); what it holds is kept: "
                "free some space and run the same command again"
            ) from error
        self._size += len(line)

    def __exit__(self, *exception) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read(path: str | Path) -> list[dict]:
    """The records, without a last line that a kill cut short; the file is left as it is."""
    try:
        return parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise EagleError(f"cannot read {path}: {error.strerror}") from error


def parse(data: bytes, path: str | Path) -> list[dict]:
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1], dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise EagleError(
                f"{path}:{number} is damaged ({error}); delete the line, and it is made again"
            ) from error
    return records
