"""A `torch.profiler` trace of a few training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from train.head.distributed import silence

SKIP = (
    2  # steps before the first recorded one: allocations and compilations are not what a step costs
)
ROWS = 40


class StepProfiler:
    """Records `steps` steps once `SKIP` of this process are over: trace.json and operators.txt in
    `folder`.

    A run that ends earlier leaves what was recorded until then, or nothing.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.seen = 0
        self._profile: torch.profiler.profile | None = None

    def before_step(self) -> None:
        if self.steps and self.seen == SKIP and self._profile is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True
            )
            with silence():  # Kineto announces itself
                self._profile.start()

    def after_step(self) -> Path | None:
        """The trace's path, at the step that completes it."""
        self.seen += 1
        return self._stop() if self._profile and self.seen == SKIP + self.steps else None

    def close(self) -> Path | None:
        """The trace's path, where the run ended while it was recorded."""
        if self._profile and self.seen > SKIP:
            return self._stop()
        if self._profile:  # within its first step
            self._profile.stop()
            self._profile = None
        return None

    def _stop(self) -> Path:
        assert self._profile is not None
        with silence():
            self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        cuda = torch.cuda.is_available()
        table = self._profile.key_averages().table(
            sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=ROWS
        )
        trace = self.folder / "trace.json"
        part = self.folder / f".trace-{os.getpid()}.json"
        self._profile.export_chrome_trace(str(part))
        os.replace(part, trace)
        (self.folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        self._profile, self.steps = None, 0
        return trace
