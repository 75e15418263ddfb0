"""The two processes of a test, both forks of the zygote: the init that waits, and the program that
gives up every privilege and runs.

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
import json
import marshal
import os
import signal
import struct
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator

from . import isolation as kernel
from .cell import Cell

FAILED, UNCOMPILED, STARTED, VALUE, NO_MEMORY = b"F", b"C", b"S", b"V", b"M"


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
