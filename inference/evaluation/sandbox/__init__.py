"""Run untrusted Python programs on many inputs, in parallel, as confined as the kernel allows.

    with Sandbox(Limits(cpu_seconds=2), allow_code_execution=True) as sandbox:
        print(sandbox.level)                                   # "namespaces" or "rlimits"
        [outcome] = sandbox.run(Program("print(int(input()) + 1)"), ["41"])
        print(outcome.status, outcome.stdout)                  # ok b'42\\n'

Linux only. Knows nothing of expected outputs: those are `judge.py`'s, and never reach a program.

What holds a program at each level (`Sandbox.isolation` says what was reached):

| | namespaces | rlimits |
|---|---|---|
| processes | a PID namespace a test, gone with its first process | found in /proc and killed |
| files | a root of its own with interpreter and libraries | Landlock (Linux 5.13), or uid 65534 |
| written | `file_bytes` of memory | a folder, checked as below |
| network | a namespace without an interface that is up | no sockets (seccomp) |
| user | 65534 when started by root, else the caller; never a capability | the same |
| limits | rlimits a process; the whole tree is checked every 25 to 250 ms | the same |

Not prevented: reading what the interpreter may read; `cpu_seconds` on every core between two
checks; noticing that one is being tested; bugs of the kernel. Code that somebody wrote to break out
belongs in a virtual machine. A program whose output depends on the order of a set of strings may
differ from run to run. At "rlimits" there is no /dev/stdin and no shared semaphore.

A worker is a zygote process: in there `runner.py` watches tests and becomes the program, `cell.py`
has the two levels, and `isolation.py` the kernel's means.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from eagle.errors import EagleError

from .cell import remove_tree
from .runner import receive, send

LEVELS = ("auto", "namespaces", "rlimits")
STATUSES = tuple("ok timeout memory output_limit runtime_error compile_error harness_error".split())
GRACE = 1.5  # a program is stopped at this multiple of its CPU limit: near misses can be seen
STRETCH = 10  # the wall clock's, at most, while other processes keep a program from running
SELF_TEST = "import colorsys\nopen('file', 'w').close()\nprint('ready')"

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

TestInput = str | bytes | list  # standard input, or the argument list of a call


@dataclass(frozen=True)
class Limits:
    """What one test may use. CPU time decides: load changes it little, and a near miss has a second
    try, alone. The wall clock is there for programs that wait; what waits for a core has up to
    STRETCH times as long."""

    cpu_seconds: float = 4.0  # of the whole process tree
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30  # address space of each process, and private memory of the tree
    output_bytes: int = 8 << 20  # standard output and error together, or the JSON of a result
    file_bytes: int = 16 << 20  # everything written to the scratch folder
    processes: int = 16  # threads included
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """Code that reads standard input, or whose function `fn_name` (or method of `Solution`) is
    called. The trusted `prelude` runs before it in the same module."""

    code: str
    fn_name: str | None = None
    prelude: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one test did. `status` is one of STATUSES; only "ok" comes with output. "harness_error"
    is ours (no memory for a process, a worker that died), never the program's."""

    status: str
    stdout: bytes = b""
    value: Any = None  # of a call, as JSON gives it
    seconds: float = 0.0  # wall clock
    cpu_seconds: float = 0.0
    memory_bytes: int = 0  # the largest resident set among its processes
    detail: str = ""
    retried: bool = False  # timed out near the limit, and this is its second run, alone


@dataclass(eq=False)
class Job:
    """A program and its tests. `observe(index, outcome)` sees each outcome, in order; True ends the
    job. The outcomes that `Sandbox.map` yields then have no output: it need not be held."""

    program: Program
    tests: Sequence[TestInput]
    key: Any = None
    limits: Limits | None = None
    observe: Callable[[int, Outcome], bool | None] | None = None


class Worker:
    """A zygote process, the socket to it, and `isolation`: what it reached. OSError where it cannot
    be started. `stop` leaves nothing, and may be repeated; the next `run` starts a fresh one."""

    def __init__(self, python: str, level: str) -> None:
        self.python, self.level = python, level
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        self.scratch = ""
        if self.level == "rlimits":
            self.scratch = tempfile.mkdtemp(prefix="eagle-sandbox-")
            os.chmod(self.scratch, 0o711)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_SECONDS)
        self.stream = self.socket.makefile("rb")
        options = ("-I", "-B", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", BOOT)
        settings = (os.path.dirname(__file__), self.level, self.scratch, str(theirs.fileno()))
        try:
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
            self.isolation, _ = receive(self.stream)
            if "detail" in self.isolation:
                raise OSError(self.isolation["detail"])
        except BaseException:
            self.stop()
            raise

    def run(self, program: dict, test: bytes, limits: dict) -> tuple[dict[str, Any], bytes]:
        """Fields of an `Outcome` and the output; "harness_error" where the zygote is of no use."""
        try:
            if self.process is None:
                self.start()
            self.socket.settimeout(limits["most_wall_seconds"] + PATIENCE_SECONDS)
            send(self.socket, {"program": program, "limits": limits}, test)
            found, body = receive(self.stream)
        except OSError as error:
            found, body = {"status": "harness_error", "detail": str(error)}, b""
        if found["status"] == "harness_error":
            self.stop()
        return found, body

    def hang_up(self) -> None:
        """End the zygote and whatever it runs: it watches for this. From any thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Hang up and wait; a stuck zygote is killed."""
        self.hang_up()
        self.stream.close()
        self.socket.close()
        process, self.process = self.process, None
        if process:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.scratch:
            with contextlib.suppress(OSError):  # it has removed it itself
                remove_tree(self.scratch)


class Sandbox(contextlib.AbstractContextManager):
    """Workers that run programs, at `level`. A context manager; `close` ends everything.
    `level`: "auto" takes "namespaces" where the kernel allows them, else "rlimits", and refuses
    where nothing would protect the caller's files; naming a level takes what it offers here.
    `workers`: as many as there are cores to run on. `python`: the interpreter for the programs."""

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        level: str = "auto",
        *,
        allow_code_execution: bool = False,
        python: str | None = None,
    ) -> None:
        if not allow_code_execution:
            raise EagleError(
                "this runs programs that a model wrote on this machine: confined, but not in a "
                "virtual machine. Read inference/evaluation/sandbox/__init__.py, then pass "
                "allow_code_execution=True (--allow_code_execution)"
            )
        if sys.platform != "linux":
            raise EagleError(
                f"the sandbox needs Linux (namespaces, /proc), not {sys.platform}: "
                "run the execution stage in a Linux machine or container"
            )
        if level not in LEVELS:
            raise EagleError(f"unknown isolation level {level!r}; known: {', '.join(LEVELS)}")
        self._count = len(os.sched_getaffinity(0)) if workers is None else workers
        if self._count < 1:
            raise EagleError(f"workers must be at least 1, not {workers}")
        self.limits, self.python = limits or Limits(), python or sys.executable
        self.isolation: dict[str, Any] = {}
        self.workers: list[Worker] = []
        self._in_use, self._gate = threading.Lock(), threading.Lock()
        self._turns = threading.Semaphore(self._count)
        missed = []
        for name in LEVELS[1:] if level == "auto" else [level]:
            try:
                self._start_at(name)
                self.level = name
                break
            except BaseException as error:
                self.close()
                if not isinstance(error, OSError):
                    raise
                missed.append(f"{name}: {error}")
        else:
            raise EagleError(
                f"no sandbox can be started here: {'; '.join(missed)} (does {self.python} -I run?)"
            )
        if level == "auto" and self.isolation["files"] == "open":
            self.close()
            raise EagleError(
                "nothing here would keep a program from changing your files "
                f"({'; '.join(missed)}; no Landlock). Run as root in a container, allow user "
                "namespaces, or accept it with level='rlimits'"
            )
        if missed:
            self.isolation["not_reached"] = missed

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker and whatever it runs; remove every file. Safe to repeat."""
        self._over = True
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.stop()
        self.workers = []

    def _start_at(self, level: str) -> None:
        """All workers at one level, once a program has run there."""

        def add(_: int = 0) -> None:
            self.workers.append(Worker(self.python, level))

        add()
        self.isolation = self.workers[0].isolation
        [outcome] = self.run(Program(SELF_TEST), [""], Limits())
        if outcome.stdout != b"ready\n":
            nobody = "; uid 65534 must be able to read it" if os.geteuid() == 0 else ""
            reason = f"{outcome.status}: {outcome.detail}{nobody}"
            raise OSError(f"{self.python} ended with {reason}")
        with ThreadPoolExecutor() as pool:
            list(pool.map(add, range(1, self._count)))

    def run(
        self, program: Program, tests: Sequence[TestInput], limits: Limits | None = None
    ) -> list[Outcome]:
        """One program on each input, each in a process of its own; outcomes in order."""
        [(_, outcomes)] = self.map([Job(program, tests, limits=limits)])
        return outcomes

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Outcome]]]:
        """Jobs as they are completed, each on one worker; `jobs` is read, in threads of ours, as
        workers become free, and may block. A test that ended just above its CPU limit, or whose
        worker failed, is repeated once while nothing else runs here."""
        if not self.workers:
            raise EagleError("the sandbox is closed")
        if not self._in_use.acquire(blocking=False):
            raise EagleError("a sandbox serves one map or run at a time; finish the other first")
        self._over, done = False, queue.SimpleQueue()
        source, reading, working = iter(jobs), threading.Lock(), len(self.workers)

        def serve(worker: Worker) -> None:
            error = None
            try:
                while not self._over:
                    with reading:
                        job = next(source, None)
                    if job is None:
                        break
                    done.put((job, self._outcomes(worker, job)))
            except BaseException as raised:
                error = raised
            done.put(error)

        with ThreadPoolExecutor(working) as pool:
            try:
                for worker in self.workers:
                    pool.submit(serve, worker)
                while working:
                    found = done.get()
                    if isinstance(found, BaseException):
                        raise found
                    if found is None:
                        working -= 1
                    else:
                        yield found
            finally:
                self._over = True
                if working:  # abandoned halfway: what runs now ends, and workers start afresh
                    for worker in self.workers:
                        worker.hang_up()
                self._in_use.release()

    def _outcomes(self, worker: Worker, job: Job) -> list[Outcome]:
        outcomes: list[Outcome] = []
        stop = False
        while not (stop or self._over) and len(outcomes) < len(job.tests):
            outcome = self._test(worker, job, job.tests[len(outcomes)])
            if job.observe:
                stop = job.observe(len(outcomes), outcome)
                outcome = replace(outcome, stdout=b"", value=None)
            outcomes.append(outcome)
        return outcomes

    def _test(self, worker: Worker, job: Job, test: TestInput) -> Outcome:
        program, limits = job.program, asdict(job.limits or self.limits)
        limits["kill_cpu_seconds"] = GRACE * limits["cpu_seconds"]
        limits["wall_seconds"] = max(limits["wall_seconds"], limits["kill_cpu_seconds"])
        limits["most_wall_seconds"] = STRETCH * limits["wall_seconds"]
        given = encode(test)
        for alone in (False, True):
            turns = self._count if alone else 1
            with self._gate:  # who waits to run alone lets nobody else begin
                for _ in range(turns):
                    self._turns.acquire()
            try:
                found, body = worker.run(asdict(program), given, limits)
            finally:
                self._turns.release(turns)
            near = found.pop("near", False)
            if self._over or not (near or found["status"] == "harness_error"):
                break
        value = None
        if found["status"] == "ok" and program.fn_name is not None:
            try:
                value = decode(body)
            except (ValueError, RecursionError) as error:
                found.update(status="runtime_error", detail=f"no usable JSON was returned: {error}")
            body = b""
        return Outcome(stdout=body, value=value, retried=alone, **found)


def encode(test: TestInput) -> bytes:
    """A test's input as the runner reads it."""
    if isinstance(test, list):
        return marshal.dumps(test, 2)  # like JSON, but keys of dicts keep their type
    return test if isinstance(test, bytes) else test.encode("utf-8", "surrogatepass")


def decode(body: bytes) -> Any:
    """JSON that a program wrote; very long integers become Decimals, which are read fast."""
    return json.loads(
        body, parse_int=lambda text: int(text) if len(text) <= LONG_INTEGER else Decimal(text)
    )
