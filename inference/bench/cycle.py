"""What a cycle of the decode loop does: its time by phase and pass, its operators, its Python, its
host reads.

A cycle is seen from one commit to the next, while all rows are in flight. Each of the three watches
looks at a generation of its own, so that no one's cost shows in another's figures. Knows the
engine's classes by name; knows nothing of text, files or command lines.
"""

from __future__ import annotations

import abc
import bisect
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("eagle", "kernels"))
BOUNDARY = "cycle boundary"
PHASES = ("commit", "draft", "verify")
# what makes the host wait for a tensor's values
READS = {
    "tolist",
    "item",
    "cpu",
    "numpy",
    "nonzero",
    "unique",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}


@dataclass
class Cycles:
    """Names, with what each cycle counted of them."""

    counts: list[Counter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def names(self) -> list[str]:
        return sorted({name for cycle in self.counts for name in cycle})

    def typical(self, name: str) -> float:
        """The median over cycles."""
        return statistics.median(cycle[name] for cycle in self.counts)

    def mean(self, name: str) -> float:
        return sum(cycle[name] for cycle in self.counts) / len(self)

    def total(self) -> float:
        """The median over cycles of everything that was counted."""
        return statistics.median(sum(cycle.values()) for cycle in self.counts)


class Watch(abc.ABC):
    """Takes what has been counted so far at every commit, and hands out the differences."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.marks: list[Counter] = []

    @abc.abstractmethod
    def so_far(self) -> Counter:
        """What has been counted since the start, by name."""

    def on_cache(self, cache, drafter) -> None:
        # a row that ended takes part in no later cycle, and never comes back
        if len(cache.order) == self.rows:
            self.marks.append(Counter(self.so_far()))

    def cycles(self) -> Cycles:
        # the first follows the prompts and has nothing to commit
        found, marks = [], self.marks[1:]
        for before, after in zip(marks[:-1], marks[1:], strict=True):
            found.append(Counter({name: after[name] - before[name] for name in after}))
        return Cycles(found)


class Phases(Watch):
    """Seconds by phase, and of the target's and the head's passes, with their numbers."""

    def __init__(self, rows: int, timings, device: torch.device) -> None:
        super().__init__(rows)
        self.timings, self.device = timings, device
        self.passes: Counter = Counter()

    def so_far(self) -> Counter:
        return Counter({**{name: getattr(self.timings, name) for name in PHASES}, **self.passes})

    @contextmanager
    def watching(self):
        from eagle.draft import HeadDrafter
        from eagle.target import Target

        with ExitStack() as stack:
            for owner, method, name in (
                (Target, "forward", "target"),
                (HeadDrafter, "_pass", "head"),
                (HeadDrafter, "ingest", "head"),
            ):
                stack.enter_context(self._timed(owner, method, name))
            yield

    @contextmanager
    def _timed(self, owner: type, method: str, name: str):
        """`owner.method` with its seconds under `name`, and its calls under "name passes"."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            self._synchronise()
            started = time.perf_counter()
            result = original(*args, **kwargs)
            self._synchronise()
            self.passes[name] += time.perf_counter() - started
            self.passes[f"{name} passes"] += 1
            return result

        setattr(owner, method, timed)
        try:
            yield
        finally:
            setattr(owner, method, original)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Python(Watch):
    """Calls of Python functions, of all code, and lines run in eagle/ and kernels/: ("calls" or
    "lines", name).

    A generator counts as called each time it goes on; a loop shows in its lines, be there a call in
    it or not.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.counter: Counter = Counter()

    def so_far(self) -> Counter:
        return self.counter

    @contextmanager
    def watching(self):
        before, counter = sys.gettrace(), self.counter

        def lines(frame, event, arg):
            if event == "line":
                counter["lines", frame.f_code] += 1
            return lines

        def calls(frame, event, arg):
            code = frame.f_code
            counter["calls", code] += 1
            return lines if code.co_filename.startswith(OURS) else None

        sys.settrace(calls)
        try:
            yield
        finally:
            sys.settrace(before)

    def kind(self, kind: str) -> Cycles:
        """Of "calls" or "lines", by function; the watch's own are left out."""
        found = []
        for cycle in self.cycles().counts:
            named: Counter = Counter()
            for (what, code), number in cycle.items():
                if what == kind and code.co_filename != __file__:
                    named[function_name(code)] += number
            found.append(named)
        return Cycles(found)


class Operators(Watch):
    """Torch operators, and the reads that make the host wait, by where they are made."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(rows)
        self.reads = Reads()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, acc_events=True)
        self.spent: dict[str, list[float]] = {}

    def so_far(self) -> Counter:
        with record_function(BOUNDARY):
            return self.reads.counter

    @contextmanager
    def watching(self):
        with self.profiler, self.reads:
            yield

    def tables(self) -> tuple[Cycles, Cycles, dict[str, tuple[float, float]]]:
        """By cycle, operators that Python called, and everything that was recorded; and of the
        latter by name microseconds a cycle, on the host and on the device, without what it called.

        Python's are told apart because what they call is PyTorch's own choice: zeros are a `fill_`
        from some size on, for instance.
        """
        events = self.profiler.events()
        # one a mark; the first cycle is left out, as in `cycles`
        starts = sorted(e.time_range.start for e in events if e.name == BOUNDARY and on_host(e))[1:]
        called, counts = ([Counter() for _ in starts[1:]] for _ in range(2))
        spent: dict[str, tuple[float, float]] = {}
        for event in events:
            place = bisect.bisect_right(starts, event.time_range.start) - 1
            if not 0 <= place < len(counts) or event.name == BOUNDARY or not on_host(event):
                continue
            counts[place][event.name] += 1
            if is_operator(event) and not is_operator(event.cpu_parent):
                called[place][event.name] += 1
            host, device = spent.get(event.name, (0.0, 0.0))
            spent[event.name] = (
                host + event.self_cpu_time_total / len(counts),
                device + event.self_device_time_total / len(counts),
            )
        return Cycles(called), Cycles(counts), spent


def is_operator(event) -> bool:
    """Not a runtime call or a compiled kernel, which are recorded too."""
    return event is not None and "::" in event.name


def on_host(event) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


class Reads(TorchFunctionMode):
    """Counts `READS` by the line of ours that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            frame = sys._getframe(1)
            while frame is not None and not frame.f_code.co_filename.startswith(OURS):
                frame = frame.f_back
            where = function_name(frame.f_code) if frame else "elsewhere"
            self.counter[f"{where}: {name}"] += 1
        return func(*args, **(kwargs or {}))


def function_name(code) -> str:
    """ "request.py Row.take"; before Python 3.11 without the class."""
    return f"{Path(code.co_filename).name} {getattr(code, 'co_qualname', code.co_name)}"


@dataclass
class Counts:
    """One setting: what its cycles did, by name. spent: microseconds a cycle of what was
    `recorded`.
    """

    rows: int
    tree: str
    operators: Cycles
    calls: Cycles
    lines: Cycles
    reads: Cycles
    spent: dict[str, tuple[float, float]]
    recorded: Cycles

    KINDS = {
        "operators": "torch operator calls",
        "calls": "Python function calls",
        "lines": "Python lines of ours",
        "reads": "host reads",
    }


def count(generate: Callable, rows: int, tree: str, device: torch.device) -> Counts:
    """generate(on_cache): runs a generation of `rows` rows, whose cycles on_cache sees."""
    operators = Operators(rows, device)
    with operators.watching():
        generate(operators.on_cache)
    python = Python(rows)
    with python.watching():
        generate(python.on_cache)
    called, recorded, spent = operators.tables()
    return Counts(
        rows,
        tree,
        called,
        python.kind("calls"),
        python.kind("lines"),
        operators.cycles(),
        spent,
        recorded,
    )


def alike(model, ids: list[list[int]], rows: int, tree: str, cycles: int) -> Callable:
    """For `count`: a generation whose cycles are all of one kind, at every tree and number of rows.

    Every second row keeps one draft token a cycle and the others none, right or wrong, so that rows
    gain unevenly; lengths always differ, and all rows are done in the same cycle.
    """
    tokens = [token for prompt in ids for token in prompt]
    kept = [i % 2 for i in range(rows)]
    requests = []
    for i, k in enumerate(kept):
        length = 16 + i + k * 2 * cycles  # those that gain more are ahead from the start
        repeated = tokens * (length // len(tokens) + 1)
        requests.append({"input_ids": repeated[:length], "max_new_tokens": 1 + cycles * (1 + k)})
    # one number a row, which `force` compares with depths [b, N]
    forced = torch.tensor(kept, device=model.target.device)[:, None]

    def generate(on_cache):
        model.generate(
            requests, tree=tree, forced_acceptance=forced, eos_token_id=-1, on_cache=on_cache
        )

    return generate


def grown(small: Counts, large: Counts, kind: str) -> dict[str, tuple[float, float]]:
    """Name -> (small, large), of what a typical cycle of `large` does more often."""
    a, b = getattr(small, kind), getattr(large, kind)
    pairs = {name: (a.typical(name), b.typical(name)) for name in b.names}
    return {name: pair for name, pair in pairs.items() if pair[1] > pair[0]}
