"""The one callback of a run: it writes what is logged, shows how far the run is, saves what is
evaluated, and ends the run in order: at the last step, by the clock, or by a signal."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from eagle.meter import Bar, remaining
from train.finetune.run import Run
from train.runs import MetricsLog, StopSignals, trim_heap


class Journal(TrainerCallback):
    def __init__(self, run: Run, rows: Any = None) -> None:
        self.run, self.rows, self.stop = run, rows, StopSignals()
        self.bar = Bar(run.quiet or not run.world.first)
        self.log: MetricsLog | None = None
        self.found = ""
        self.spent = 0.0  # share of the time budget

    def on_train_begin(self, args, state, control, **kwargs):
        if self.run.world.first:
            self.log = MetricsLog(self.run.output / "metrics.jsonl", state.global_step)
        self.began, self.first = time.monotonic(), state.global_step
        self.tell(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.rows is not None:  # a mixture has another order in each
            self.rows.set_epoch(int(state.epoch or 0))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is None or "train_runtime" in logs:
            return
        self.log.write({"step": state.global_step, **logs})
        numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k != "epoch"}
        shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        if "eval_loss" in logs:
            self.bar.note(f"step {state.global_step}/{state.max_steps}  {shown}")
        else:
            self.found = shown
            self.tell(state, now=state.global_step == 1)

    def tell(self, state, now: bool = False) -> None:
        step, last = state.global_step, max(state.max_steps, 1)
        seconds, done = max(time.monotonic() - self.began, 1e-9), step - self.first
        eta = remaining(seconds, done / max(last - self.first, 1))
        text = f"{self.found}  {done / seconds:.3g} steps/s  ETA {eta}".strip()
        self.bar.show(f"step {step}/{last}", step / last, text, now=now)

    def on_step_end(self, args, state, control, **kwargs):
        trim_heap(state.global_step, self.run.world.device)
        self.tell(state)
        budget = 60 * (self.run.cfg.train.time_budget_minutes or math.inf)
        spent = (time.monotonic() - self.began) / budget
        # alike on all ranks
        self.spent, number = self.run.world.max([spent, float(self.stop.number)])
        if number:
            self.stop.number = int(number)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        elif state.global_step >= state.max_steps or self.spent >= 1:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = control.should_log = True
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step > 0:
            control.should_save = True  # what was judged best must be there
        return control
