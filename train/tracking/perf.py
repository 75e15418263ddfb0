"""What a step costs: seconds by phase, tokens/s, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

PHASES = ("data", "target", "head", "backward", "optimizer")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that PyTorch holds on a GPU, or the resident set, and the maximum of it."""
    if device.type == "cuda":
        held, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"allocated": held, "peak_allocated": most}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    resident = psutil.Process().memory_info().rss
    return {"resident": resident, "peak_resident": max(peak, resident)}


@dataclass
class PerfMeter:
    """Times the phases of each step, and makes a row of every `every`-th (0: of none).

    A GPU only queues its work, so the time of a phase is known by waiting for it; that costs time,
    and is done in the steps that make a row.
    """

    device: torch.device
    every: int
    times: dict[str, float] = field(default_factory=dict)
    due: bool = False
    _since: list[dict] = field(default_factory=list)  # the steps since the last row

    def begin(self, step: int) -> None:
        """Before step number `step` (from 1)."""
        self.times = dict.fromkeys(PHASES, 0.0)
        self.due = self.every > 0 and step % self.every == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; in a profile it carries the name."""
        with torch.profiler.record_function(f"train.{name}"):
            self._wait()
            began = time.perf_counter()
            yield
            self._wait()
            self.times[name] += time.perf_counter() - began

    def _wait(self) -> None:
        if self.due and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, row: dict) -> dict | None:
        """A step's metrics -> where its time went and the rates since the last row, when due."""
        if self.every:
            self._since.append(row)
        if not self.due:
            return None
        steps, self._since = self._since, []
        wall = sum(1 / r["steps_per_second"] for r in steps)
        tokens, targets = (sum(r[key] for r in steps) for key in ("tokens", "targets"))
        whole = 1 / row["steps_per_second"]
        seconds = {**row["seconds"], "other": max(whole - sum(row["seconds"].values()), 0.0)}
        return {
            "step": row["step"],
            "steps": len(steps),
            "seconds_per_step": wall / len(steps),
            "seconds": seconds,
            "tokens_per_second": tokens / wall,
            "supervised_tokens_per_second": targets / wall,
            "memory": memory(self.device),
        }
