"""The far side: a zygote, a clean `python -I` process that forks a child for every test.

It has the standard library imported, reads one test at a time from its control socket, watches
clock, output and process tree, and answers. It never runs a program's code: a test is two forks of
it in a cell (`cell.py`), the init that waits, and the program that gives up every privilege.

It sees this folder as a package of another name: nothing here may import more than the standard
library and its siblings.

What a program says to the zygote goes over a private descriptor, each message behind a random token
of the test. Once the program's code has started, nothing on that descriptor can be trusted: it can
find the token in a frame and send a value of its own making. It gains nothing that returning this
value would not: the expected value is never in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import marshal
import math
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from . import isolation as kernel
from .cell import LEVELS, MOST_FILES, Cell, Look, remove_tree

FAILED, UNCOMPILED, STARTED, VALUE, NO_MEMORY = b"F", b"C", b"S", b"V", b"M"

TAIL_BYTES = 16 << 10  # kept of standard error
FIRST_LOOK, LONG_LOOK, SHORT_LOOK = 0.05, 0.25, 0.025  # seconds between looks at the process tree
# what contest programs import: loaded once, shared by every fork
WARM = """array bisect calendar cmath collections copy datetime decimal fractions functools heapq
itertools math numbers operator queue random re statistics string time typing""".split()


def send(connection: socket.socket, header: dict, body: bytes = b"") -> None:
    line = json.dumps({**header, "size": len(body)}).encode()
    connection.sendall(line + b"\n" + body)


def receive(stream: BinaryIO) -> tuple[dict, bytes]:
    """One message from a connection's `makefile("rb")`."""
    line = stream.readline()
    if line.endswith(b"\n"):
        header = json.loads(line)
        size = header.pop("size")
        body = stream.read(size)
        if len(body) == size:
            return header, body
    raise ConnectionError("the other side is gone")


class Test:
    """One input for one program, watched from the zygote."""

    def __init__(self, cell: Cell, program: dict, limits: dict) -> None:
        self.cell, self.program, self.limits = cell, program, limits
        self.token = os.urandom(16)
        self.data = {"out": bytearray(), "err": bytearray(), "report": bytearray()}
        self.volume = 0
        self.broken: tuple[str, str] | None = None  # what it was stopped for: status and detail
        self.seen = Look()
        self.files = f"more than {limits['file_bytes']} bytes or {MOST_FILES} files written"

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
        verdict, detail = self._judge(status, cpu, memory, full)
        near = verdict == "timeout" and not self.broken
        header = {"status": verdict, "detail": detail, "near": near}
        header |= {"seconds": wall, "cpu_seconds": cpu, "memory_bytes": memory}
        body = self.data["report"][34:] if call else self.data["out"]
        return header, bytes(body) if verdict == "ok" else b""

    def _fork_and_watch(self, control: socket.socket, started: float) -> tuple[int | None, Any]:
        """The program's wait status (None: its init was ended first) and its tree's usage."""
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
                    self.broken = "timeout", f"stopped after {now - started:.2f} s of wall clock"
                else:  # other processes keep it from running
                    deadline = min(most, now + self.limits["wall_seconds"])

    def _look(self) -> float:
        """Hold the whole tree against its limits; seconds until the next look."""
        before = time.monotonic()
        self.seen, limits = self.cell.look(), self.limits
        cpu = self.seen.cpu_seconds
        if cpu >= limits["kill_cpu_seconds"]:
            self.broken = "timeout", f"stopped after {cpu:.2f} s of CPU time"
        elif self.seen.processes > limits["processes"]:
            self.broken = "runtime_error", f"more than {limits['processes']} processes"
        elif self.seen.memory_bytes > limits["memory_bytes"]:
            self.broken = "memory", f"more than {limits['memory_bytes']} bytes in all"
        elif self.cell.scratch_is_full(limits["file_bytes"]):
            self.broken = "output_limit", self.files
        pause = LONG_LOOK if self.seen.processes <= 1 else SHORT_LOOK
        # looking takes at most a twentieth of the time
        spent = 20 * (time.monotonic() - before)
        return max(min(pause, limits["kill_cpu_seconds"] - cpu), 0.01, spent)

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
        said = f"more than {self.limits['output_bytes']} bytes of output"
        self.broken = self.broken or ("output_limit", said)
        return True

    def _judge(self, status: int | None, cpu: float, memory: int, full: bool) -> tuple[str, str]:
        """Status and detail. What the program said counts only where it cannot help it."""
        limits, report, token = self.limits, self.data["report"], self.token
        first, second = bytes(report[:17]), bytes(report[17:34])
        for kind, verdict in ((FAILED, "harness_error"), (UNCOMPILED, "compile_error")):
            if first == token + kind:
                return verdict, report[17:].decode("utf-8", "replace")
        if self.broken:
            return self.broken
        if status is None:  # a program of another user cannot have done it
            who = "harness_error" if self.cell.drops_user else "runtime_error"
            return who, "the process that waits for the program was killed"
        code = os.waitstatus_to_exitcode(status)
        name = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        if first != token + STARTED:
            return ("compile_error" if code < 0 else "harness_error"), f"{name} before it started"
        if cpu > limits["cpu_seconds"] or code == -signal.SIGXCPU:
            return "timeout", f"{cpu:.2f} s of CPU time"
        if code == -signal.SIGXFSZ or (code and full):
            return "output_limit", self.files
        crashed = code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGKILL)
        if second == token + NO_MEMORY or (crashed and memory > 0.8 * limits["memory_bytes"]):
            return "memory", f"out of memory, {memory} bytes in use at the most"
        if code:
            said = self.data["err"].decode("utf-8", "replace").strip() if code > 0 else ""
            return "runtime_error", said.splitlines()[-1][:300] if said else name
        if self.program["fn_name"] and second != token + VALUE:
            return "runtime_error", "ended before the function returned"
        return "ok", ""


def be_init(cell: Cell, program: dict, limits: dict, token: bytes, ends: dict[str, int]) -> None:
    """Start the program, wait for it, write its wait status. Never returns."""
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        pid = os.fork()
        if pid == 0:
            be_program(cell, program, limits, token, ends)
        for name in ("out", "err"):
            os.close(ends[name])
        while True:  # orphans come to the init of a namespace
            ended, status = os.wait()
            if ended == pid:
                os.write(ends["status"], struct.pack("!i", status))
                break
    except BaseException as error:
        os.write(ends["report"], token + FAILED + describe(error))
    finally:
        os._exit(0)


def be_program(cell: Cell, program: dict, limits: dict, token: bytes, ends: dict[str, int]) -> None:
    """Confine this process, compile the code, run it. Never returns."""
    write, leave, getpid = os.write, os._exit, os.getpid
    channel, name = ends["report"], program["fn_name"]

    def say(kind: bytes, text: bytes = b"") -> None:
        data = memoryview(token + kind + text)
        while data:
            data = data[write(channel, data) :]

    try:
        channel = place_descriptors(cell, limits, ends)
        cell.confine(limits)
        arguments = marshal.loads(program["input"]) if name is not None else None
        module = open_module("__main__" if name is None else "program", cell.work)
        exec(compile(program["prelude"], "prelude.py", "exec"), module.__dict__)
    except BaseException as error:
        say(FAILED, describe(error))
        leave(1)
    try:
        code = compile(program["code"], "program.py", "exec", dont_inherit=True)
    except BaseException as error:  # a SyntaxError, or too large or too deep to compile
        say(UNCOMPILED, describe(error))
        leave(1)
    own, encode = getpid(), json.JSONEncoder(default=plain).encode
    no_memory = token + NO_MEMORY  # nothing is allocated when it is needed
    say(STARTED)
    status = 0
    try:
        exec(code, module.__dict__)
        if name is not None:
            result = encode(find(module, name)(*arguments)).encode()
            if getpid() == own:  # not in a fork that came back too
                say(VALUE, result)
            leave(0)
    except SystemExit as error:
        whole = isinstance(error.code, int)
        status = error.code & 255 if whole else int(error.code is not None)
        if status and not whole:
            with contextlib.suppress(BaseException):
                print(error.code, file=sys.stderr)
    except MemoryError:
        write(channel, no_memory)
        leave(1)
    except BaseException as error:
        status = 1
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error, error.__traceback__.tb_next)
    finish(module, status, leave)


def place_descriptors(cell: Cell, limits: dict, ends: dict[str, int]) -> int:
    """The three standard streams and the private channel, whose number is returned. No others."""
    with contextlib.suppress(OSError):  # the first to go when the machine is short of memory
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        score = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=cell.procfs)
        os.write(score, b"1000")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    channel = fcntl.fcntl(ends["report"], fcntl.F_DUPFD_CLOEXEC, limits["open_files"] - 1)
    stdin = os.open(f"{cell.top}/stdin", os.O_RDONLY)
    for number, end in enumerate((stdin, ends["out"], ends["err"])):
        os.dup2(end, number)
    os.closerange(3, channel)
    os.closerange(channel + 1, channel + 256)
    return channel


def open_module(name: str, work: str) -> types.ModuleType:
    """An empty module to run the code in, and standard streams as a fresh interpreter has them."""
    text = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **text)
    sys.stdout = sys.__stdout__ = open(1, "w", **text)
    text["errors"] = "backslashreplace"
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, **text)
    sys.argv = ["program.py"]
    os.environ["HOME"] = os.environ["TMPDIR"] = work
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "program.py"
    return module


def find(module: types.ModuleType, name: str) -> Callable:
    """The function to call: a method of the class `Solution`, or a global of the program."""
    solution = getattr(module, "Solution", None)
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    if hasattr(module, name):
        return getattr(module, name)
    raise NameError(f"the program defines no function {name!r}")


def plain(value: object) -> object:
    """JSON for what contest functions return besides plain values; sets are sorted if possible."""
    if hasattr(value, "tolist"):  # a NumPy array or scalar
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        with contextlib.suppress(TypeError):
            return sorted(value)
    views = (type({}.keys()), type({}.values()), type({}.items()))
    if isinstance(value, (set, frozenset, deque, range, Iterator, *views)):
        return list(value)
    raise TypeError(f"the function returned {type(value).__name__}, which has no JSON form")


def finish(module: types.ModuleType, status: int, leave: Callable) -> None:
    """End as an interpreter does (threads, exit functions, files), without taking it apart."""
    stdout = sys.__stdout__
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        module.__dict__.clear()  # files that the program left open are written out
        gc.collect()
        for stream in (sys.stdout, stdout):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = status or 120
    leave(status)


def describe(error: BaseException) -> bytes:
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:300]


def main() -> None:
    _, level, scratch, control = sys.argv[1:]
    control = socket.socket(fileno=int(control))
    for name in WARM:
        importlib.import_module(name)
    try:
        cell = LEVELS[level](scratch)
        gc.freeze()
        send(control, cell.describe())
        with control.makefile("rb") as stream:
            while True:
                header, body = receive(stream)
                test = Test(cell, {**header["program"], "input": body}, header["limits"])
                send(control, *test.run(control))
    except ConnectionError:  # the parent is gone
        pass
    except Exception as error:  # it will start a fresh zygote
        detail = f"{type(error).__name__}: {error}"
        send(control, {"status": "harness_error", "detail": detail})
    finally:
        if scratch:
            remove_tree(scratch)
