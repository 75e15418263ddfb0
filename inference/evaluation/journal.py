"""A file of JSON lines that only grows, and that a kill or a full disk cannot spoil.

A line is there whole or not at all: what a kill left of the last one is cut off when the file is
opened again, and a write that fails is taken back. One process at a time may have it open.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path

from eagle.errors import EagleError

SYNC_SECONDS = 2.0


class Journal:
    """`records` holds what was in the file when it was opened; `append` may be called from any
    thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: a record that `append` has returned from survives a kill of this process
            self._file = open(self.path, "a+b", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise EagleError(
                f"another run is writing to {self.path}; wait for it, or choose another --output"
            ) from error
        except OSError as error:
            raise EagleError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output"
            ) from error
        self._file.seek(0)
        data = self._file.read()
        self._size = data.rfind(b"\n") + 1
        try:
            self.records = parse(data, self.path)
        except EagleError:
            self._file.close()
            raise
        self._file.truncate(self._size)

    def append(self, record: dict) -> None:
        """Raises EagleError when the disk is full; the file is then as it was before."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
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

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                os.fsync(self._file.fileno())
                self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read(path: str | Path) -> list[dict]:
    """The records of a journal, which is left as it is; a last line that a kill cut short is left
    out."""
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
