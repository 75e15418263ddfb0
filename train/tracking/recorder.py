"""The one object that the training loop tells what happened; it shows and keeps it.

    OUTPUT/run.json        what the run was made of, from its start
    OUTPUT/metrics.jsonl   a row every train.log_every steps
    OUTPUT/perf.jsonl      a row every train.perf_every steps
    OUTPUT/events.jsonl    starts, evaluations, warnings
    OUTPUT/tensorboard/    and what else train.report_to names
    OUTPUT/profile/        train.profile
    OUTPUT/report.html     made of the files above when the run ends

Every rank has one; the first rank's writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile, schedule

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text
from train.head.distributed import World
from train.head.metrics import Progress
from train.runs import MetricsLog
from train.tracking.card import environment
from train.tracking.perf import PerfMeter, memory
from train.tracking.report import write_report
from train.tracking.trackers import open_trackers, reason, scalars


class Recorder(logging.Handler):
    """As a handler of loggers it keeps their warnings, and shows what logging would have shown."""

    def __init__(
        self,
        cfg: HeadTrainConfig,
        output: Path,
        world: World,
        *,
        total: int | None,
        quiet: bool = False,
    ) -> None:
        """Writes nothing yet. total: steps of the run, None where only the clock ends it."""
        super().__init__(logging.WARNING)
        self.cfg, self.output, self.world = cfg, output, world
        self.facts = environment(world.device, world.size)
        self.perf = PerfMeter(world.device, cfg.train.perf_every)
        self.phase = self.perf.phase
        self.progress = Progress(total, quiet=quiet or not world.first)
        self.note = self.progress.note
        self.profiler: profile | None = None
        self.trackers: dict = {}
        self.at = 0

    @contextlib.contextmanager
    def running(self, step: int, card: dict) -> Iterator[None]:
        """Files and trackers are open, and warnings of `train` and `eagle` loggers are kept.
        Whatever ends it, trackers are closed and the report is written.

        step: 0, or the one that is resumed; what an earlier process wrote of later ones is dropped.
        card: what the run is made of; with the environment it becomes run.json.
        """
        if not self.world.first:
            yield
            return
        self.at = step
        self._open(step, card)
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for logger in map(logging.getLogger, ("train", "eagle")):
                logger.addHandler(self)
                stack.callback(logger.removeHandler, self)
            yield

    def _open(self, step: int, card: dict) -> None:
        t, keep_to = self.cfg.train, step or -1
        text = json.dumps({"environment": self.facts, **card}, indent=2, ensure_ascii=False)
        atomic_write_text(self.output / "run.json", text + "\n")
        self.metrics, self.perf_rows, self.events = (
            MetricsLog(self.output / f"{name}.jsonl", keep_to)
            for name in ("metrics", "perf", "events")
        )
        self._event("start", date=self.facts["date"], processes=self.world.size)
        config = self.cfg.model_dump(mode="json")
        self.trackers = open_trackers(t.report_to, self.output, config, step)
        if t.profile:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it announces itself
            steps = schedule(wait=1, warmup=1, active=t.profile, repeat=1)
            kept = {"record_shapes": True, "profile_memory": True}
            self.profiler = profile(schedule=steps, on_trace_ready=self._write_trace, **kept)
            self.profiler.start()

    def _write_trace(self, profiler: profile) -> None:
        trace = self.output / "profile" / "trace.json"
        trace.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        self.note(f"profile: {trace}")

    def _close(self) -> None:
        self.progress.close()
        for name in list(self.trackers):
            self._guarded(name, lambda tracker: tracker.close())
        self.trackers = {}
        try:
            if self.profiler:
                self.profiler.stop()
            self.note(f"report: {write_report(self.output)}")
        except OSError as error:  # what the run is for is saved: a full disk here does not undo it
            remedy = f"make space and run python -m train.report {self.output}"
            self.note(f"no report ({error.strerror or error}); {remedy}")

    # what the loop tells

    def begin(self, step: int) -> None:
        """Before step number `step`."""
        self.at = step
        self.perf.begin(step)

    def step(self, row: dict, done: float, eta: float, elapsed: float, keep: bool) -> None:
        """row: the step's metrics, kept in metrics.jsonl if `keep`. done: 0 … 1 of the run. eta and
        elapsed: seconds."""
        perf = self.perf.add(row)
        if not self.world.first:
            return
        if self.profiler:
            self.profiler.step()
        used, step = memory(self.world.device), row["step"]
        self.progress.update(step, done, eta, row, used.get("allocated", used.get("resident")))
        if keep:
            self.metrics.write({**row, "elapsed": elapsed})
            self._track(step, scalars(row, "train"))
        if perf:
            self.perf_rows.write(perf)
            self._track(step, scalars(perf, "perf"))

    def evaluation(self, result: dict) -> None:
        """result: with its `step`, `tau` and `acceptance_by_depth`."""
        self._event("evaluation", **result)
        self._track(result["step"], scalars(result, "heldout"))

    def warn(self, text: str) -> None:
        """Shown, kept, and part of the report."""
        self.note(f"warning: {text}")
        self._event("warning", text=text)

    def emit(self, record: logging.LogRecord) -> None:
        self.warn(record.getMessage())

    def _event(self, kind: str, **values) -> None:
        if self.world.first:
            self.events.write({"step": self.at, "kind": kind, **values})

    def _track(self, step: int, values: dict[str, float]) -> None:
        for name in list(self.trackers):
            self._guarded(name, lambda tracker: tracker.log(step, values))

    def _guarded(self, name: str, call) -> None:
        try:
            call(self.trackers[name])
        except Exception as error:  # networks, quotas, disks: any may fail in any library's own way
            del self.trackers[name]
            self.warn(f"{name} failed and gets nothing more of this run: {reason(error)}")
