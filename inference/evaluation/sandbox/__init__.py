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

`worker.py` starts a zygote process and talks to it. In there `runner.py` watches tests, `cell.py`
has the two levels, `isolation.py` the kernel's means, `child.py` becomes the program.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eagle.errors import EagleError

from .worker import Worker, decode, encode

LEVELS = ("auto", "namespaces", "rlimits")
STATUSES = tuple("ok timeout memory output_limit runtime_error compile_error harness_error".split())
GRACE = 1.5  # a program is stopped at this multiple of its CPU limit: near misses can be seen
STRETCH = 10  # the wall clock's, at most, while other processes keep a program from running
SELF_TEST = "import colorsys\nopen('file', 'w').close()\nprint('ready')"

TestInput = str | bytes | list  # standard input, or the argument list of a call


@dataclass(frozen=True)
class Limits:
    """What one test may use.

    CPU time decides: load changes it little, and a near miss has a second try, alone. The wall
    clock is there for programs that wait; what waits for a core has up to STRETCH times as long."""

    cpu_seconds: float = 4.0  # of the whole process tree
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30  # address space of each process, and private memory of the tree
    output_bytes: int = 8 << 20  # standard output and error together, or the JSON of a result
    file_bytes: int = 16 << 20  # everything written to the scratch folder
    processes: int = 16  # threads included
    open_files: int = 64

    def __post_init__(self) -> None:
        least = {"memory_bytes": 1 << 20, "open_files": 32, "wall_seconds": self.cpu_seconds}
        for name, value in asdict(self).items():
            if not (value > 0 and value >= least.get(name, 0)):
                above = f"at least {least[name]}" if name in least else "above 0"
                raise EagleError(f"limit {name} must be {above}, not {value}")


@dataclass(frozen=True)
class Program:
    """Code that reads standard input, or whose function `fn_name` (or method of `Solution`) is
    called. The trusted `prelude` runs before it in the same module."""

    code: str
    fn_name: str | None = None
    prelude: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one test did. `status` is one of STATUSES; only "ok" comes with output.

    `harness_error` is ours (no memory for a process, a worker that died), never the program's."""

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
    """A program and its tests. `observe(index, outcome)` sees each outcome; True ends the job. The
    outcomes that `Sandbox.map` yields then have no output: it need not be held."""

    program: Program
    tests: Sequence[TestInput]
    key: Any = None
    limits: Limits | None = None
    observe: Callable[[int, Outcome], bool | None] | None = None


@dataclass(eq=False)
class _Task:
    """A job on its worker. `alone`: its current test is repeated while nothing else runs."""

    job: Job
    outcomes: list[Outcome] = field(default_factory=list)
    alone: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.done = not self.job.tests

    def take(self, outcome: Outcome) -> None:
        stop = False
        if self.job.observe:
            stop = self.job.observe(len(self.outcomes), outcome)
            outcome = replace(outcome, stdout=b"", value=None)
        self.outcomes.append(outcome)
        self.alone = False
        self.done = bool(stop) or len(self.outcomes) == len(self.job.tests)


class Sandbox:
    """Workers that run programs. A context manager; `close` ends everything.

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
        count = len(os.sched_getaffinity(0)) if workers is None else workers
        if count < 1:
            raise EagleError(f"workers must be at least 1, not {count}")
        self.limits = limits or Limits()
        self.python = python or sys.executable
        self.isolation: dict[str, Any] = {}
        self.workers: list[Worker] = []
        self._in_use = False
        try:
            self._start(level, count)
        except BaseException:
            self.close()
            raise

    @property
    def level(self) -> str:
        """The level reached."""
        return self.isolation["level"]

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker and whatever it runs; remove every file. Safe to repeat."""
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.stop()
        self.workers = []

    def _start(self, level: str, count: int) -> None:
        missed = []
        for name in LEVELS[1:] if level == "auto" else [level]:
            try:
                self._start_at(name, count)
                break
            except (OSError, EagleError) as error:
                self.close()
                missed.append(f"{name}: {error}")
        else:
            raise EagleError(f"no sandbox can be started here: {'; '.join(missed)}")
        if level == "auto" and self.isolation["files"] == "open":
            raise EagleError(
                "nothing here would keep a program from changing your files "
                f"({'; '.join(missed)}; no Landlock). Run as root in a container, allow user "
                "namespaces, or accept it with level='rlimits'"
            )
        if missed:
            self.isolation["not_reached"] = missed

    def _start_at(self, level: str, count: int) -> None:
        """All workers at one level, once a program has run there."""
        self._add(1, level)
        [outcome] = self.run(Program(SELF_TEST), [""], Limits())
        if outcome.stdout != b"ready\n":
            nobody = "; uid 65534 must be able to read it" if os.geteuid() == 0 else ""
            reason = f"{outcome.status}: {outcome.detail}{nobody}"
            raise OSError(f"{self.python} ended with {reason}")
        self._add(count - 1, level)

    def _add(self, count: int, level: str) -> None:
        fresh = [Worker(self.python, level) for _ in range(count)]
        self.workers += fresh
        for worker in fresh:
            worker.start()
        for worker in fresh:
            self.isolation = worker.greeting()

    def _restart(self, worker: Worker) -> None:
        worker.stop()
        try:
            worker.start()
            worker.greeting()
        except OSError as error:
            message = f"a sandbox worker ended and could not be started again: {error}"
            raise EagleError(message) from None

    def run(
        self, program: Program, tests: Sequence[TestInput], limits: Limits | None = None
    ) -> list[Outcome]:
        """One program on each input, each in a process of its own; outcomes in order."""
        [(_, outcomes)] = self.map([Job(program, tests, limits=limits)])
        return outcomes

    def map(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, list[Outcome]]]:
        """Jobs as they are completed, one worker each, over all workers.

        `jobs` is read as workers become free; a None in it means "none yet, ask again", so that a
        producer need not block the work under way. A test that ended just above its CPU limit, or
        whose worker failed, is repeated once while nothing else runs here."""
        if self._in_use:
            raise EagleError(
                "a sandbox serves one map or run at a time; finish or close the other first"
            )
        if not self.workers:
            raise EagleError("the sandbox is closed")
        self._in_use = True
        try:
            yield from self._map(iter(jobs))
        finally:
            self._in_use = False
            for worker in self.workers:
                worker.task = None
                if worker.busy:  # abandoned halfway
                    self._restart(worker)

    def _map(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, list[Outcome]]]:
        exhausted = False
        while True:
            waiting = False
            for worker in self.workers:
                if not (worker.task or exhausted or waiting or self._held()):
                    job = next(jobs, _END)
                    exhausted, waiting = job is _END, job is None
                    worker.task = None if exhausted or waiting else _Task(job)
                if worker.task and worker.task.done:
                    done, worker.task = worker.task, None
                    yield done.job, done.outcomes
                elif worker.task and not worker.busy:
                    self._begin(worker)
            if any(worker.busy for worker in self.workers):
                self._collect(0.01 if waiting else 1.0)
            elif waiting:
                time.sleep(0.01)
            elif exhausted and not any(worker.task for worker in self.workers):
                return

    def _held(self) -> bool:
        """A test waits to run alone, or does."""
        return any(worker.task and worker.task.alone for worker in self.workers)

    def _begin(self, worker: Worker) -> None:
        """Start the worker's next test, unless another's turn alone has come."""
        task = worker.task
        alone = task.alone and not any(other.busy for other in self.workers)
        if alone or not self._held():
            test = task.job.tests[len(task.outcomes)]
            program = task.job.program
            limits = asdict(task.job.limits or self.limits)
            limits["kill_cpu_seconds"] = GRACE * limits["cpu_seconds"]
            limits["wall_seconds"] = max(limits["wall_seconds"], limits["kill_cpu_seconds"])
            limits["most_wall_seconds"] = STRETCH * limits["wall_seconds"]
            worker.begin(asdict(program), encode(test, program.fn_name), limits)

    def _collect(self, seconds: float) -> None:
        """Take the answers that come within `seconds`, or sooner."""
        busy = {worker.socket.fileno(): worker for worker in self.workers if worker.busy}
        poll = select.poll()
        for end in busy:
            poll.register(end, select.POLLIN)
        ready = {end for end, _ in poll.poll(seconds * 1000)}
        for end, worker in busy.items():
            if end in ready:
                self._take(worker, *worker.answer())
            elif time.monotonic() > worker.deadline:
                late = {"status": "harness_error", "detail": "the worker did not answer"}
                self._take(worker, late, b"")

    def _take(self, worker: Worker, found: dict[str, Any], body: bytes) -> None:
        """`found`: fields of an Outcome; `body`: standard output, or a result's JSON."""
        task, value = worker.task, None
        failed, near = found["status"] == "harness_error", found.pop("near", False)
        if failed:
            self._restart(worker)
        if (failed or near) and not task.alone:
            task.alone = True
            return
        if failed:
            found["detail"] = f"{found['detail'] or 'the worker ended'}, twice"
        elif found["status"] == "ok" and task.job.program.fn_name is not None:
            try:
                value = decode(body)
            except (ValueError, RecursionError) as error:
                found.update(status="runtime_error", detail=f"no usable JSON was returned: {error}")
            body = b""
        task.take(Outcome(stdout=body, value=value, retried=task.alone, **found))


_END = object()
