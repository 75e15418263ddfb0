"""Run untrusted Python programs on many inputs, in parallel, behind the strongest walls that the
kernel offers.

    with Sandbox(Limits(cpu_seconds=2), allow_code_execution=True) as sandbox:
        print(sandbox.level)                                   # "namespaces" or "rlimits"
        [outcome] = sandbox.run(Program("print(int(input()) + 1)"), ["41"])
        print(outcome.status, outcome.stdout)                  # ok b'42\\n'

Knows nothing of expected outputs or of what is right: `judge.py` does. Linux only, standard library
only.

What holds a program at each level (`Sandbox.isolation` says what was reached):

| | `namespaces` | `rlimits` | |---|---|---| | processes | a PID namespace a test, gone with its
first process | a subreaper finds them through /proc and kills them | | files | a root of its own:
interpreter and libraries read-only, a memory file system of `file_bytes` | Landlock (Linux 5.13);
without it, for root, another user's rights | | network | a namespace without an interface that is
up | no sockets (seccomp) | | user | 65534 when started by root, else the caller; never a capability
| the same | | limits | rlimits on each process; the whole tree looked at every 25 to 250 ms | the
same |

What is not prevented: reading what the interpreter may read; `cpu_seconds` on every core until a
look at the tree; noticing that one is being tested; bugs of the kernel. Code that somebody wrote to
break out belongs in a virtual machine. A program whose output hangs on the order of a set of
strings may differ from run to run: the seed of hashes is a worker's own. At `rlimits` there is no
/dev/stdin, and no shared semaphore.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eagle.errors import EagleError

from .worker import Worker, decode, encode

LEVELS = ("auto", "namespaces", "rlimits")
STATUSES = (
    "ok",
    "timeout",
    "memory",
    "output_limit",
    "runtime_error",
    "compile_error",
    "harness_error",
)
SELF_TEST = "import colorsys\nopen('file', 'w').close()\nprint('ready')"
GRACE = 1.25  # a program is stopped at this multiple of its CPU limit, so that near misses are seen as such

TestInput = str | bytes | list  # standard input, or the argument list of a call


@dataclass(frozen=True)
class Limits:
    """What one test may use.

    CPU time is the limit that decides: load does not change it much. The wall clock is there for
    programs that wait, and leaves room. Both are stretched by what `Sandbox.calibration` measured.
    """

    cpu_seconds: float = 4.0  # of the whole process tree
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30  # address space of each process, and private memory of the tree
    output_bytes: int = 8 << 20  # standard output and error together, or the JSON of a result
    file_bytes: int = 16 << 20  # everything written to the scratch folder
    processes: int = 16  # threads included
    open_files: int = 64

    def __post_init__(self) -> None:
        least = {"memory_bytes": 1 << 20, "open_files": 32}
        for name, value in asdict(self).items():
            if not value > 0:
                raise EagleError(f"limit {name} must be above 0, not {value}")
            if value < least.get(name, 0):
                raise EagleError(f"limit {name} must be at least {least[name]}, not {value}")
        if self.wall_seconds < self.cpu_seconds:
            raise EagleError(
                f"wall_seconds ({self.wall_seconds}) must not be below cpu_seconds ({self.cpu_seconds})"
            )


@dataclass(frozen=True)
class Program:
    """Code that reads standard input, or whose function `fn_name` (or method of `Solution`) is
    called.

    `prelude` runs before it in the same module, for imports that programs take for granted; it is
    trusted.
    """

    code: str
    fn_name: str | None = None
    prelude: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one test did. `status` is one of STATUSES; only "ok" comes with output.

    `harness_error` is ours (no memory for a process, a worker that died), never the program's.
    """

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
    """A program and its tests. `observe(index, outcome)` sees each outcome; True ends the job
    there.

    With `keep_output=False` the outcomes that `Sandbox.map` yields have lost their output: what
    `observe` made of it is what was wanted, and a hundred tests of megabytes need not be held.
    """

    program: Program
    tests: Sequence[TestInput]
    key: Any = None
    limits: Limits | None = None
    observe: Callable[[int, Outcome], bool | None] | None = None
    keep_output: bool = True


@dataclass(eq=False)
class _Progress:
    """A job on its worker."""

    job: Job
    outcomes: list[Outcome] = field(default_factory=list)
    done: bool = False
    again: bool = False  # the current test is to run once more, alone
    retried: bool = False  # that is its present run

    def __post_init__(self) -> None:
        self.done = not self.job.tests

    def take(self, outcome: Outcome) -> None:
        index, job = len(self.outcomes), self.job
        self.again = self.retried = False
        stop = job.observe(index, outcome) if job.observe else False
        if not job.keep_output:
            outcome = replace(outcome, stdout=b"", value=None)
        self.outcomes.append(outcome)
        self.done = bool(stop) or len(self.outcomes) == len(job.tests)


class Sandbox:
    """Workers that run programs. A context manager; `close` ends everything.

    `level`: "auto" takes "namespaces" where the kernel allows them, else "rlimits", and refuses
    where nothing would protect the caller's files; naming a level takes what it offers here.
    `workers`: as many as there are cores to run on. `python`: the interpreter that runs the
    programs, default this one.
    """

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
                "this runs programs that a model wrote on this machine: confined, but not in a virtual machine. "
                "Read inference/sandbox.py, then pass allow_code_execution=True (--allow_code_execution)"
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
        self.calibration = {"cpu_factor": 1.0, "wall_factor": 1.0}
        self.workers: list[Worker] = []
        self._scratch = ""
        self._in_use = False
        try:
            self._start(level, count)
            self.calibration = self._calibrate()
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
            worker.socket.close()
        for worker in self.workers:
            worker.stop()
        self.workers = []
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def run(
        self, program: Program, tests: Sequence[TestInput], limits: Limits | None = None
    ) -> list[Outcome]:
        """One program on each input, each in a process of its own; outcomes in the order of
        `tests`.
        """
        [(_, outcomes)] = self.map([Job(program, tests, limits=limits)])
        return outcomes

    def map(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, list[Outcome]]]:
        """Jobs as they are completed, one worker each, over all workers.

        `jobs` is read as workers become free; a None in it means "none yet, ask again", so that a
        producer need not block the work under way. A test that ran out of time close to its limit,
        or while other processes kept it from running, or whose worker failed, is repeated once
        while nothing else runs here.
        """
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
                if worker.busy:  # abandoned halfway
                    worker.stop()
                    self._restart(worker)
                worker.progress = None

    def _map(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, list[Outcome]]]:
        exhausted = False
        while True:
            waiting = False
            for worker in self.workers:
                ask = not (worker.progress or exhausted or waiting or self._held())
                if ask:
                    job = next(jobs, _END)
                    exhausted, waiting = job is _END, job is None
                    if not exhausted and not waiting:
                        worker.progress = _Progress(job)
                while worker.progress and worker.progress.done:
                    done, worker.progress = worker.progress, None
                    yield done.job, done.outcomes
                self._begin(worker)
            busy = [worker for worker in self.workers if worker.busy]
            if busy:
                self._collect(busy, 0.01 if waiting else 1.0)
            elif waiting:
                time.sleep(0.01)
            elif exhausted and not any(worker.progress for worker in self.workers):
                return

    def _held(self) -> bool:
        """A test waits to run alone, or does."""
        jobs = [worker.progress for worker in self.workers if worker.progress]
        return any(progress.again or progress.retried for progress in jobs)

    def _begin(self, worker: Worker) -> None:
        """Start the worker's next test, unless it has none or another's turn alone has come."""
        progress = worker.progress
        if worker.busy or progress is None:
            return
        if self._held():
            if not progress.again or any(other.busy for other in self.workers):
                return
            progress.again, progress.retried = False, True
        job = progress.job
        try:
            code = job.program.code.encode()
        except UnicodeEncodeError as error:
            progress.take(Outcome("compile_error", detail=f"the code is no valid text: {error}"))
            return
        data = encode(job.tests[len(progress.outcomes)], job.program.fn_name)
        try:
            worker.begin(job.program, code, data, self._scaled(job.limits))
        except OSError:
            self._failed(worker)

    def _collect(self, busy: list[Worker], seconds: float) -> None:
        """Take the answers that come within `seconds`, or sooner."""
        poll = select.poll()
        for worker in busy:
            poll.register(worker.socket, select.POLLIN)
        ready = {end for end, _ in poll.poll(seconds * 1000)}
        for worker in busy:
            if worker.socket.fileno() in ready:
                answer = worker.answer()
                if answer and answer[0]["status"] != "harness_error":
                    self._take(worker, *answer)
                else:
                    self._failed(worker, answer[0]["detail"] if answer else "")
            elif time.monotonic() > worker.deadline:
                self._failed(worker, "the worker did not answer")

    def _take(self, worker: Worker, header: dict[str, Any], body: bytes) -> None:
        progress = worker.progress
        if header["near"] and not progress.retried:
            progress.again = True
            return
        status, detail, stdout, value = header["status"], header["detail"], body, None
        if status == "ok" and progress.job.program.fn_name is not None:
            stdout = b""
            try:
                value = decode(body)
            except (ValueError, RecursionError) as error:
                status, detail = "runtime_error", f"no usable JSON was returned: {error}"
        progress.take(
            Outcome(
                status,
                stdout,
                value,
                header["wall_seconds"],
                header["cpu_seconds"],
                header["memory_bytes"],
                detail,
                progress.retried,
            )
        )

    def _failed(self, worker: Worker, detail: str = "") -> None:
        """The zygote is of no more use: a fresh one repeats the test, alone, once. No `detail`: it
        has ended.
        """
        progress = worker.progress
        worker.stop()
        self._restart(worker)
        if not progress.retried:
            progress.again = True
            return
        # a program that has the caller's own rights can kill its runner
        exposed = self.level == "rlimits" and self.isolation["user"] != "nobody"
        status = "harness_error" if detail or not exposed else "runtime_error"
        detail = f"{detail or 'the worker ended'}, twice"
        progress.take(Outcome(status, detail=detail, retried=True))

    def _scaled(self, limits: Limits | None) -> dict[str, float]:
        """Limits for the runner, stretched by how much slower full load makes this machine."""
        scaled = asdict(limits or self.limits)
        scaled["cpu_seconds"] *= self.calibration["cpu_factor"]
        scaled["kill_cpu_seconds"] = GRACE * scaled["cpu_seconds"]
        wall = scaled["wall_seconds"] * self.calibration["wall_factor"]
        scaled["wall_seconds"] = max(wall, scaled["kill_cpu_seconds"])
        return scaled

    # -- starting --

    def _start(self, level: str, count: int) -> None:
        ways = [(True, True)] + [(True, False)] * (os.geteuid() == 0) + [(False, False)]
        wanted = {"namespaces": True, "rlimits": False}.get(level)
        reasons = []
        for namespaces, new_user in ways:
            if wanted not in (None, namespaces):
                continue
            reason = self._try(namespaces, new_user, count)
            if reason:
                name = "rlimits" if not namespaces else "namespaces"
                user = " with a user namespace" if new_user else ""
                reasons.append(f"{name}{user}: {reason}")
                continue
            if level == "auto" and self.isolation["files"] == "open":
                raise EagleError(
                    "nothing here would keep a program from changing your files "
                    f"({'; '.join(reasons)}; no Landlock). Run as root in a container, allow user namespaces, "
                    "or accept it with level='rlimits'"
                )
            if reasons:
                self.isolation["not_reached"] = reasons
            return
        raise EagleError(f"no sandbox can be started here: {'; '.join(reasons)}")

    def _try(self, namespaces: bool, new_user: bool, count: int) -> str:
        """Start all workers this way and run a program; the reason why it cannot be done, or
        nothing.
        """
        if not namespaces and not self._scratch:
            self._scratch = tempfile.mkdtemp(prefix="eagle-sandbox-")
            os.chmod(self._scratch, 0o711)
        scratch = "" if namespaces else self._scratch
        settings = {"namespaces": namespaces, "new_user": new_user, "scratch": scratch}
        try:
            self._add(1, settings)
            [outcome] = self.run(Program(SELF_TEST), [""], Limits())
            if outcome.stdout != b"ready\n":
                nobody = "; uid 65534 must be able to read it" if os.geteuid() == 0 else ""
                raise OSError(
                    f"{self.python} ended with {outcome.status}: {outcome.detail}{nobody}"
                )
            self._add(count - 1, settings)
        except (OSError, EagleError) as error:
            for worker in self.workers:
                worker.stop()
            self.workers = []
            return str(error)
        return ""

    def _add(self, count: int, settings: dict[str, Any]) -> None:
        fresh = [Worker(self.python, settings) for _ in range(count)]
        self.workers += fresh
        for worker in fresh:
            self.isolation = worker.greeting()

    def _restart(self, worker: Worker) -> None:
        worker.start()
        try:
            worker.greeting()
        except OSError as error:
            raise EagleError(
                f"a sandbox worker ended and could not be started again: {error}"
            ) from None

    def _calibrate(self) -> dict[str, float]:
        """How much more CPU time and wall clock a piece of work takes with every worker at it than
        alone.
        """
        alone = min(self._measure(self.workers[:1])[0]["cpu_seconds"] for _ in range(3))
        together = self._measure(self.workers)
        return {
            f"{name}_factor": min(10.0, max(1.0, *(t[f"{name}_seconds"] / alone for t in together)))
            for name in ("cpu", "wall")
        }

    def _measure(self, workers: list[Worker]) -> list[dict[str, float]]:
        for worker in workers:
            worker.calibrate()
        answers = [worker.answer() for worker in workers]
        if None in answers:
            raise EagleError("a sandbox worker ended while it was measured; try again")
        return [header for header, _ in answers]


_END = object()
