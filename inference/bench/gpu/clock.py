"""Timing on a device: cold caches, CUDA events, medians; on a CPU the wall clock.

Knows callables; knows nothing of models.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from .sizes import Size

Work = Callable[[], object]


class Stopwatch:
    """Times work on one device; every figure is a median in milliseconds."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.repeats, self.seconds = device, size.repeats, size.seconds
        # written between two timings, larger than the L2: what is timed finds nothing of its data
        # there
        self.cold = torch.empty(size.cold_bytes, dtype=torch.uint8, device=device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def device_ms(self, work: Work, before: Work | None = None) -> float:
        """Of the device, from the first kernel to the last; before: untimed, ahead of each run."""
        work()
        self.wait()
        if not self.cuda:
            return self.wall_ms(work, before)
        events = []
        begun = time.perf_counter()
        for _ in range(self.repeats):
            if before is not None:
                before()
            self.cold.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
            if len(events) % 4 == 0:
                self.wait()
                if time.perf_counter() - begun > self.seconds and len(events) >= 8:
                    break
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def wall_ms(self, work: Work, before: Work | None = None) -> float:
        """Of the host, until the device is done: what a caller waits for."""
        work()
        spent = []
        begun = time.perf_counter()
        for _ in range(self.repeats):
            if before is not None:
                before()
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            spent.append(1e3 * (time.perf_counter() - started))
            if time.perf_counter() - begun > self.seconds and len(spent) >= 3:
                break
        return statistics.median(spent)

    def copy_bandwidth(self, size: int) -> float:
        """Bytes a second of a copy of `size` bytes on the device, read and written ones counted."""
        source = torch.empty(size // 4, dtype=torch.int32, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * 4 * source.numel() / (1e-3 * self.device_ms(lambda: target.copy_(source)))


def capture(work: Work, device: torch.device) -> Work:
    """`work` as a CUDA graph, its replay; elsewhere `work` itself. It has run a few times before,
    so whatever it changes must be put back."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # Triton compiles, libraries allocate: not in a capture
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def synchronisations(work: Work, device: torch.device) -> list[str] | None:
    """Where the host waited for the device in one run of `work`, a line for each time; None off a
    GPU.
    """
    if device.type != "cuda":
        return None
    work()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    asked = [w for w in seen if "called a synchronizing" in str(w.message)]
    return [f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in asked]


def busy_ms(work: Work, device: torch.device, runs: int = 3) -> float | None:
    """Milliseconds of a run in which any kernel or copy runs on the device; None off a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    # what listens to kernels cannot be taken down and set up again beside CUDA graphs
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    work()
    torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(runs):
            work()
        torch.cuda.synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return 1e-3 * union(spans) / runs


def union(spans: list[tuple[float, float]]) -> float:
    """The length that sorted intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
