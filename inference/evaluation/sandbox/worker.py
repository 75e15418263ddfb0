"""A worker seen from the parent: a zygote process, the socket to it, and the task that it has."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import socket
import subprocess
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

from eagle.errors import EagleError

from .shared import receive, remove_tree, send

PATIENCE_SECONDS = 30.0  # beyond a test's wall limit; then the zygote itself is taken to be stuck
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
# in a clean interpreter this folder is a package of a name that no program imports by accident
BOOT = """\
import sys, types
package = sys.modules["_eagle_sandbox"] = types.ModuleType("_eagle_sandbox")
package.__path__ = [sys.argv[1]]
from _eagle_sandbox.runner import main
main()
"""
LONG_INTEGER = 4300  # digits; beyond, Python's own conversion refuses or is slow


class Worker:
    """`start` comes before everything else; `stop` leaves nothing, and may be repeated."""

    def __init__(self, python: str, level: str) -> None:
        self.python, self.level = python, level
        self.task: Any = None  # the sandbox's
        self.deadline: float | None = None
        self.scratch = ""
        self.socket = self.process = None

    @property
    def busy(self) -> bool:
        return self.deadline is not None

    def start(self) -> None:
        self.deadline = None
        if self.level == "rlimits":
            self.scratch = tempfile.mkdtemp(prefix="eagle-sandbox-")
            os.chmod(self.scratch, 0o711)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_SECONDS)
        self.stream = self.socket.makefile("rb")
        options = ("-I", "-B", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", BOOT)
        settings = (str(Path(__file__).parent), self.level, self.scratch, str(theirs.fileno()))
        with theirs:
            self.process = subprocess.Popen(
                [self.python, *options, *settings],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                stdout=subprocess.DEVNULL,
            )

    def greeting(self) -> dict[str, Any]:
        """The isolation that the zygote reached, once it is ready. OSError where it cannot be."""
        try:
            header, _ = receive(self.stream)
        except EOFError:
            message = f"the runner ended at its start; does `{self.python} -I` run?"
            raise OSError(message) from None
        if "error" in header:
            raise OSError(header["error"])
        return header

    def begin(self, program: dict[str, Any], test: bytes, limits: dict[str, float]) -> None:
        """Start a test; `answer` has what came of it, also where the zygote is gone."""
        self.deadline = time.monotonic() + limits["most_wall_seconds"] + PATIENCE_SECONDS
        with contextlib.suppress(OSError):
            send(self.socket, {"program": program, "limits": limits}, test)

    def answer(self) -> tuple[dict[str, Any], bytes]:
        """Fields of an `Outcome` and the output; "harness_error" where the zygote is of no use."""
        self.deadline = None
        try:
            return receive(self.stream)
        except (OSError, EOFError):
            return {"status": "harness_error", "detail": ""}, b""

    def hang_up(self) -> None:
        """End the zygote and whatever it runs: it watches for this."""
        if self.socket:
            self.stream.close()
            self.socket.close()

    def stop(self) -> None:
        """Hang up and wait; a stuck zygote is killed."""
        self.deadline = None
        self.hang_up()
        if self.process:
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.scratch:
            with contextlib.suppress(OSError):  # it has removed it itself
                remove_tree(self.scratch)


def encode(test: str | bytes | list, fn_name: str | None) -> bytes:
    """A test's input as the runner reads it. Raises EagleError for an input of the wrong kind."""
    if fn_name is not None:
        if isinstance(test, list):
            return marshal.dumps(test, 2)  # like JSON, but keys of dicts keep their type
        raise EagleError(f"a call's input is the list of its arguments, not {type(test).__name__}")
    if isinstance(test, bytes):
        return test
    if isinstance(test, str):
        return test.encode("utf-8", "surrogatepass")
    raise EagleError(f"standard input is text, not {type(test).__name__}")


def decode(body: bytes) -> Any:
    """JSON that a program wrote; very long integers become Decimals, which are read fast."""
    return json.loads(
        body, parse_int=lambda text: int(text) if len(text) <= LONG_INTEGER else Decimal(text)
    )
