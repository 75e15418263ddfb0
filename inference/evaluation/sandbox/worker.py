"""A worker of the sandbox seen from the parent: a zygote process, its socket, and what is sent over
it.

Knows nothing of scheduling; `sandbox.py` does that.
"""

from __future__ import annotations

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

from .wire import receive, send

PATIENCE_SECONDS = 30.0  # beyond a test's wall limit; then the zygote itself is taken to be stuck
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
LONG_INTEGER = 4300  # digits; beyond, Python's own conversion refuses or is slow


class Worker:
    """One zygote process, its socket, and the job that it works on."""

    def __init__(self, python: str, settings: dict[str, Any]) -> None:
        self.python, self.settings = python, settings
        self.progress: Any = None  # the sandbox's job on it
        self.start()

    def start(self) -> None:
        self.program, self.deadline = None, None
        scratch = self.settings["scratch"]
        if scratch:
            scratch = tempfile.mkdtemp(dir=scratch)
            os.chmod(scratch, 0o711)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_SECONDS)
        settings = {**self.settings, "scratch": scratch, "control": theirs.fileno()}
        options = ("-I", "-B", "-X", "utf8", "-X", "int_max_str_digits=0")
        runner = str(Path(__file__).with_name("runner.py"))
        with theirs:
            self.process = subprocess.Popen(
                [self.python, *options, runner, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                stdout=subprocess.DEVNULL,
            )

    @property
    def busy(self) -> bool:
        return self.deadline is not None

    def greeting(self) -> dict[str, Any]:
        """The isolation that the zygote reached, once it is ready. OSError where it cannot
        start.
        """
        message = receive(self.socket)
        if not message:
            raise OSError(f"the runner ended at its start; does `{self.python} -I` run?")
        if "error" in message[0]:
            raise OSError(message[0]["error"])
        return message[0]["isolation"]

    def calibrate(self) -> None:
        """Ask for the time that a fixed piece of work takes; `answer` has it."""
        send(self.socket, {"do": "calibrate"})

    def begin(self, program: Any, code: bytes, test: bytes, limits: dict[str, float]) -> None:
        """Start a test; `answer` has what came of it. The program is sent where it is not there
        yet.
        """
        self.deadline = time.monotonic() + limits["wall_seconds"] + PATIENCE_SECONDS
        if program is not self.program:
            header = {"fn_name": program.fn_name, "prelude": program.prelude}
            send(self.socket, {"do": "program", "program": header}, code)
            self.program = program
        send(self.socket, {"do": "test", "limits": limits}, test)

    def answer(self) -> tuple[dict, bytes] | None:
        """Header and body; None where the zygote has ended, or stops in the middle."""
        try:
            message = receive(self.socket)
        except OSError:
            message = None
        self.deadline = None
        return message

    def stop(self) -> None:
        """Closing the socket ends the zygote and whatever it runs; a stuck one is killed."""
        self.socket.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


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
    """JSON that a program wrote; very long integers become Decimals, which compare exactly and read
    fast.
    """
    return json.loads(
        body, parse_int=lambda text: int(text) if len(text) <= LONG_INTEGER else Decimal(text)
    )
