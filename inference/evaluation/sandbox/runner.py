"""The far side: a zygote, a clean `python -I` process that forks a child for every test.

It has the standard library imported, reads one test at a time from its control socket, watches
clock, output and process tree, and answers. It never runs a program's code: a test is a fork of it
(`child.py`) in a cell (`cell.py`).

`worker.py` starts it, with this folder as a package of another name: nothing here may import more
than the standard library and its siblings.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, BinaryIO

from .cell import LEVELS, MOST_FILES, Cell, Look
from .child import FAILED, NO_MEMORY, STARTED, UNCOMPILED, VALUE, be_init
from .shared import receive, remove_tree, send

TAIL_BYTES = 16 << 10  # kept of standard error
FIRST_LOOK, LONG_LOOK, SHORT_LOOK = 0.05, 0.25, 0.025  # seconds between looks at the process tree
# what contest programs import: loaded once, shared by every fork
WARM = """array bisect calendar cmath collections copy datetime decimal fractions functools heapq
itertools math numbers operator queue random re statistics string time typing""".split()


class Test:
    """One input for one program, watched from the zygote."""

    def __init__(self, cell: Cell, program: dict, limits: dict) -> None:
        self.cell, self.program, self.limits = cell, program, limits
        self.token = os.urandom(16)
        self.data = {"out": bytearray(), "err": bytearray(), "report": bytearray()}
        self.volume = 0
        self.broken = ""  # the limit that it was stopped for
        self.seen = Look()

    def run(self, control: socket.socket) -> tuple[dict, bytes]:
        """Fields of an `Outcome` and `near` (to be repeated), and the output."""
        call = self.program["fn_name"] is not None
        self.cell.open_scratch(b"" if call else self.program["input"], self.limits["file_bytes"])
        try:
            started = time.monotonic()
            status, usage = self._fork_and_watch(control, started)
            wall = time.monotonic() - started
            full = self.cell.scratch_is_full(self.limits["file_bytes"])
        finally:
            self.cell.close_scratch()
        # processes that went with their namespace are missing from what init used
        cpu = max(usage.ru_utime + usage.ru_stime, self.seen.cpu_seconds)
        memory = max(usage.ru_maxrss * 1024, self.seen.memory_bytes)
        verdict, detail = self._judge(status, wall, cpu, memory, full)
        near = verdict == "timeout" and not self.broken
        header = {"status": verdict, "detail": detail, "near": near}
        header |= {"seconds": wall, "cpu_seconds": cpu, "memory_bytes": memory}
        body = self.data["report"][34:] if call else self.data["out"]
        return header, bytes(body) if verdict == "ok" else b""

    def _fork_and_watch(self, control: socket.socket, started: float) -> tuple[int | None, Any]:
        """The program's wait status (None: its init was ended first) and what its tree used, of
        which nothing is left."""
        with contextlib.ExitStack() as stack:
            streams, ends = {}, {}
            for name in ("out", "err", "report", "status"):
                read, ends[name] = os.pipe()
                os.set_blocking(read, False)
                streams[name] = stack.enter_context(open(read, "rb", buffering=0))
            try:
                init = self.cell.fork()
                if init == 0:
                    be_init(self.cell, self.program, self.limits, self.token, ends)
            finally:
                for end in ends.values():
                    os.close(end)
            try:
                self._watch(streams, control, started)
            finally:
                os.kill(init, signal.SIGKILL)
                usage = os.wait4(init, 0)[2]
                self.cell.reap()
            for name in self.data:
                self._read(name, streams[name])
            status = streams["status"].read(4)
        return struct.unpack("!i", status)[0] if status else None, usage

    def _watch(self, streams: dict[str, BinaryIO], control: socket.socket, started: float) -> None:
        """Until the program has ended or breaks a limit. SystemExit when the parent is gone."""
        names = {stream.fileno(): name for name, stream in streams.items()}
        poll = select.poll()
        for end in (*names, control.fileno()):
            poll.register(end, select.POLLIN)
        deadline, look = started + self.limits["wall_seconds"], started + FIRST_LOOK
        while not self.broken:
            wait = max(0.0, min(deadline, look) - time.monotonic())
            for end, _ in poll.poll(math.ceil(wait * 1000)):
                if end == control.fileno():
                    raise SystemExit
                if names[end] == "status":
                    return
                if not self._read(names[end], streams[names[end]]):
                    poll.unregister(end)
            now = time.monotonic()
            if now >= min(look, deadline):
                look = time.monotonic() + self._look()
            if now >= deadline and not self.broken:
                wanted = self.seen.cpu_seconds + self.seen.waited_seconds
                most = started + self.limits["most_wall_seconds"]
                if wanted < 0.5 * (now - started) or now >= most:
                    self.broken = "wall"
                else:  # other processes keep it from running
                    deadline = min(most, now + self.limits["wall_seconds"])

    def _look(self) -> float:
        """Hold the whole tree against its limits; seconds until the next look."""
        before = time.monotonic()
        self.seen, limits = self.cell.look(), self.limits
        if self.seen.cpu_seconds >= limits["kill_cpu_seconds"]:
            self.broken = "cpu"
        elif self.seen.processes > limits["processes"]:
            self.broken = "processes"
        elif self.seen.memory_bytes > limits["memory_bytes"]:
            self.broken = "memory"
        elif self.cell.scratch_is_full(limits["file_bytes"]):
            self.broken = "files"
        pause = LONG_LOOK if self.seen.processes <= 1 else SHORT_LOOK
        left = limits["kill_cpu_seconds"] - self.seen.cpu_seconds
        # looking takes at most a twentieth of the time
        return max(min(pause, left), 0.01, 20 * (time.monotonic() - before))

    def _read(self, name: str, stream: BinaryIO) -> bool:
        """Take what has come; False at the end of the stream."""
        kept = self.data[name]
        while self.volume <= self.limits["output_bytes"]:
            part = stream.read(1 << 16)
            if not part:
                return part is None
            self.volume += len(part)
            kept += part
            if name == "err":
                del kept[:-TAIL_BYTES]
        self.broken = self.broken or "output"
        return True

    def _judge(
        self, status: int | None, wall: float, cpu: float, memory: int, full: bool
    ) -> tuple[str, str]:
        """Status and detail. What the program said counts only where it cannot help it."""
        limits, report, token = self.limits, self.data["report"], self.token
        first, second = bytes(report[:17]), bytes(report[17:34])
        for kind, verdict in ((FAILED, "harness_error"), (UNCOMPILED, "compile_error")):
            if first == token + kind:
                return verdict, report[17:].decode("utf-8", "replace")
        files = f"more than {limits['file_bytes']} bytes or {MOST_FILES} files written"
        if self.broken:
            return {
                "output": ("output_limit", f"more than {limits['output_bytes']} bytes of output"),
                "files": ("output_limit", files),
                "memory": ("memory", f"more than {limits['memory_bytes']} bytes in all"),
                "processes": ("runtime_error", f"more than {limits['processes']} processes"),
                "wall": ("timeout", f"stopped after {wall:.2f} s of wall clock"),
                "cpu": ("timeout", f"stopped after {cpu:.2f} s of CPU time"),
            }[self.broken]
        if status is None:  # a program of another user cannot have done it
            who = "harness_error" if self.cell.drops_user else "runtime_error"
            return who, "the process that waits for the program was killed"
        code = os.waitstatus_to_exitcode(status)
        name = f"killed by {signal_name(-code)}" if code < 0 else f"exit status {code}"
        if first != token + STARTED:
            return ("compile_error" if code < 0 else "harness_error"), f"{name} before it started"
        if cpu > limits["cpu_seconds"] or code == -signal.SIGXCPU:
            return "timeout", f"{cpu:.2f} s of CPU time"
        if code == -signal.SIGXFSZ or (code and full):
            return "output_limit", files
        crashed = code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGKILL)
        if second == token + NO_MEMORY or (crashed and memory > 0.8 * limits["memory_bytes"]):
            return "memory", f"out of memory, {memory} bytes in use at the most"
        if code:
            said = self.data["err"].decode("utf-8", "replace").strip() if code > 0 else ""
            return "runtime_error", said.splitlines()[-1][:300] if said else name
        if self.program["fn_name"] and second != token + VALUE:
            return "runtime_error", "ended before the function returned"
        return "ok", ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have none
        return f"signal {number}"


def main() -> None:
    _, level, scratch, control = sys.argv[1:]
    control = socket.socket(fileno=int(control))
    for name in WARM:
        importlib.import_module(name)
    try:
        cell = LEVELS[level](scratch)
    except OSError as error:
        send(control, {"error": str(error)})
        raise SystemExit(1) from None
    gc.freeze()
    try:
        send(control, cell.describe())
        with control.makefile("rb") as stream:
            while True:
                header, body = receive(stream)
                test = Test(cell, {**header["program"], "input": body}, header["limits"])
                send(control, *test.run(control))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        raise SystemExit(1) from None
    except Exception as error:  # it will start a fresh zygote
        detail = f"{type(error).__name__}: {error}"
        send(control, {"status": "harness_error", "detail": detail})
    finally:
        if scratch:
            remove_tree(scratch)
