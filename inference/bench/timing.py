"""The bench's one way to time (warm up, wait for the device, take turns, repeat; figures are
medians), and to see how much memory work needs."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Work = Callable[[], object]


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Work, device: torch.device) -> tuple[float, object]:
    """Seconds until the device is done, and what `work` returned."""
    wait(device)
    started = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - started, result


def turns(names: list, repeats: int, shift: int = 0) -> Iterator:
    """Every name `repeats` times: each round begins with another one and every second round goes
    backwards, so that none always follows the same other."""
    for repeat in range(repeats):
        first = (shift + repeat) % len(names)
        order = names[first:] + names[:first]
        yield from order if repeat % 2 == 0 else order[::-1]


def race(works: dict[str, Work], repeats: int, device: torch.device) -> tuple[dict, dict]:
    """Seconds of each repeat, and the last result, by name, after a warm-up."""
    results = {name: work() for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for name in turns(list(works), repeats):
        spent, results[name] = timed(works[name], device)
        seconds[name].append(spent)
    return seconds, results


def milliseconds(work: Work, device: torch.device, repeats: int) -> float:
    """The median: of a GPU alone with a cold L2 cache; elsewhere what a caller waits for."""
    if device.type != "cuda":
        return 1e3 * statistics.median(race({"": work}, repeats, device)[0][""])
    from triton.testing import do_bench

    return do_bench(work, return_mode="median")


def capture(work: Work, device: torch.device) -> Work:
    """`work` as a CUDA graph, its replay; off a GPU `work` itself. It has run a few times before,
    so whatever it changes must be put back."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # Triton compiles, libraries allocate: not in a capture
            work()
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class PeakMemory:
    """Bytes needed at the most since it was made: on a GPU what the allocator held, weights
    included; on a CPU how far the resident set grew (memory that the process freed earlier and uses
    again does not show)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # without it growth above the highest mark so far
            Path("/proc/self/clear_refs").write_text("5")
        self.before = high_water()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(high_water() - self.before, 0)


def high_water() -> int:
    """The process's largest resident set, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory of tensors that `work` held beyond what was there, to the byte; slow on a
    CPU, where it comes from the allocator's own record."""
    if device.type == "cuda":
        before, memory = torch.cuda.memory_allocated(device), PeakMemory(device)
        timed(work, device)
        return memory.bytes() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
