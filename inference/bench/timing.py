"""The bench's one way to time, and to see how much memory work needs.

Warm up, wait for the device, take turns, repeat; figures are medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Work = Callable[[], object]


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
    backwards, so that none always follows the same other.
    """
    for repeat in range(repeats):
        first = (shift + repeat) % len(names)
        order = names[first:] + names[:first]
        yield from order if repeat % 2 == 0 else order[::-1]


def race(
    works: dict[str, Work], repeats: int, device: torch.device, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of each repeat, and the last result, by name."""
    if warm_up:
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    results: dict[str, object] = {}
    for name in turns(list(works), repeats):
        spent, results[name] = timed(works[name], device)
        seconds[name].append(spent)
    return seconds, results


def milliseconds(work: Work, device: torch.device, repeats: int, host: bool = False) -> float:
    """The median: of the device alone with a cold L2 cache, or with `host` what a caller waits for.
    Off a GPU there is only the latter.
    """
    if host or device.type != "cuda":
        return 1e3 * statistics.median(race({"": work}, repeats, device)[0][""])
    from triton.testing import do_bench

    return do_bench(work, return_mode="median")


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


class PeakMemory:
    """Bytes needed at the most since `start`.

    On a GPU: what the allocator held at the most, weights included. On a CPU: how far the resident
    set grew over its size at `start`; memory that the process freed earlier and uses again does not
    show.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        except OSError:
            pass  # then only growth above the highest mark so far is seen
        self.before = high_water()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(high_water() - self.before, 0)


def high_water() -> int:
    """The process's largest resident set, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory of tensors that `work` held beyond what was there, to the byte; slow on a
    CPU, where it comes from the allocator's own record.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(work, device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
