"""The training loop: rows -> target -> unrolled head -> update, evaluations, checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from configs.schema import HeadTrainConfig, TrainConfig
from eagle.checkpoint import atomic_write_text, load_head, save_head
from eagle.errors import EagleError
from eagle.heads.head import DraftHead
from eagle.meter import clock
from train import runs
from train.head import state as disk
from train.head.accumulate import Accumulator, not_finite
from train.head.distributed import World
from train.head.engine import Engine
from train.head.evaluate import acceptance
from train.head.loader import MicroBatch, Steps, read_ahead
from train.head.metrics import SourceMetrics
from train.head.setup import build, output_rows, settle, with_dtypes
from train.head.ttt import UnrolledHead
from train.tracking.card import run_card
from train.tracking.recorder import Recorder

PATHS = ("head", "metrics.jsonl", "checkpoints")


class Schedule:
    """Linear warmup, then cosine, over the run. total: optimizer steps, None when only the clock
    ends it. budget: seconds."""

    def __init__(self, cfg: TrainConfig, rows: int, rows_a_step: int) -> None:
        self.cfg, self.total, minutes = cfg, cfg.max_steps, cfg.time_budget_minutes
        if self.total is None and minutes is None:
            self.total = max(1, math.ceil(rows * cfg.epochs / rows_a_step))
        self.budget = 60 * (minutes or math.inf)

    def fraction(self, steps: int, elapsed: float) -> float:
        """0 … 1: `steps` done after `elapsed` seconds; whatever ends the run first counts."""
        return max(steps / (self.total or math.inf), elapsed / self.budget)

    def lr(self, fraction: float) -> float:
        peak, low, warm = self.cfg.lr, self.cfg.lr * self.cfg.min_lr_ratio, self.cfg.warmup_ratio
        fraction = min(max(fraction, 0.0), 1.0)
        if self.total == 1:  # nothing to warm up for, and nothing to end
            return peak
        if fraction < warm:
            return peak * fraction / warm
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (fraction - warm) / (1 - warm)))


class Trainer:
    """One run. `fit()` returns the process's exit code."""

    def __init__(self, cfg: HeadTrainConfig, output: Path, world: World, quiet: bool = False):
        self.output, self.world, resume = output, world, cfg.train.resume
        path = resume and world.first_does(
            lambda: (found := disk.find_checkpoint(output, resume)) and found.path
        )
        resumed = disk.load_checkpoint(path) if path else None
        cfg = settle(cfg, world.device, resumed.info.get("config") if resumed else None)
        t = cfg.train
        if not world.first:
            logging.getLogger("records").setLevel(logging.ERROR)  # said once is enough
        draft_ids = resumed.vocabulary["draft_ids"] if resumed else None
        parts = build(cfg, output if world.first else None, world.device, draft_ids)
        self.parts = parts
        self.cfg = cfg = with_dtypes(cfg, parts.target.identity["dtype"], t.dtype)
        if resumed is not None:
            now = json.loads(json.dumps(parts.identity))
            runs.require_same_run(resumed.path, resumed.info["identity"], now)
            for name, weight in resumed.weights.items():
                parts.head.get_parameter(name).data.copy_(weight)
        self.blank = copy.deepcopy(parts.head)  # ZeRO splits the weights, not these
        head = parts.head.to(world.device)
        rows = None if head.has_output else output_rows(parts.target)
        options = t.dtype == "bf16", t.checkpoint_activations, rows
        self.module = UnrolledHead(head, t.ttt_steps, t.ttt_decay, cfg.loss, *options)
        if t.compile:
            self.module.compile_layers()
        self.engine = Engine(self.module, cfg, world)
        self.steps = Steps(parts.data, t, parts.pad_id, world.rank, world.size)
        self.batches: Iterator[list[MicroBatch]] | None = None
        self.schedule = Schedule(t, len(parts.data), self.steps.rows)
        self.sources = SourceMetrics(parts.data.sources, self.module.depth_weights)
        self.signals = runs.StopSignals()
        self.step, self.rows_seen, self.elapsed_before = 0, 0, 0.0
        self.evaluations: list[dict] = []
        self.row: dict = {}
        self.seen = Recorder(cfg, output, world, total=self.schedule.total, quiet=quiet)
        self.accumulate = Accumulator(cfg, world, parts, self.engine, self.steps, self.seen)
        if resumed is not None:
            self._restore(resumed)

    def _restore(self, resumed: disk.TrainState) -> None:
        info = resumed.info
        self.step, self.rows_seen = info["step"], info["rows_seen"]
        self.elapsed_before, self.evaluations = info["elapsed"], info["evaluations"]
        self.row = info["row"]
        if resumed.optimizer:
            self.engine.load_optimizer_state(resumed.optimizer, prime=self._prime)
        disk.set_rng_state(resumed.rng)
        self._point_best()
        now, notes = self.cfg.model_dump(mode="json"), self.parts.notes
        notes.append(f"continues {resumed.path}")
        notes += runs.changes({k: info["config"][k] for k in ("train", "loss")}, now)
        if info["world"]["global_batch"] != self.steps.rows:
            notes.append(f"a step has another number of rows now: {self.steps.rows}")
        sums = torch.tensor(info["source_sums"], dtype=torch.float64)
        if sums.shape == self.sources.sums.shape:  # else of other ttt_steps: it begins anew
            self.sources.sums.copy_(sums)

    def _prime(self) -> None:
        """One update at learning rate 0, which makes the optimizer's state."""
        self.seen.begin(self.step + 1)
        self.accumulate(self.steps[self.rows_seen], self.step + 1)
        self.engine.update()

    def train_step(self, lr: float) -> dict:
        """One step -> its row of metrics."""
        self.seen.begin(self.step + 1)
        started = time.perf_counter()
        self.engine.set_lr(lr)
        with self.seen.phase("data"):
            if self.batches is None:
                self.batches = read_ahead(self.steps, self.rows_seen, self.world.device)
            batches = next(self.batches)
        sums = self.accumulate(batches, self.step + 1)
        with self.seen.phase("optimizer"):
            norm = self.engine.update()
        if not math.isfinite(norm):
            raise not_finite(f"gradient norm is {norm}", f"step {self.step + 1}")
        tokens = torch.tensor([sum(int(batch.attention_mask.sum()) for batch in batches)])
        sums, tokens = self.world.sum(sums), int(self.world.sum(tokens))
        self.step += 1
        self.rows_seen += self.steps.rows
        runs.trim_heap(self.step, self.world.device)
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "epoch": self.rows_seen / len(self.parts.data),
            **self.sources.step(sums),
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "steps_per_second": 1 / seconds,
            "seconds": dict(self.seen.perf.times),
        }

    # the run

    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def _agree(self) -> tuple[float, int]:
        """Elapsed seconds and signal, the same on every rank."""
        elapsed, number = self.world.max([self.elapsed(), float(self.signals.number)])
        return elapsed, int(number)

    def fit(self) -> int:
        self.started = time.monotonic()
        dtype = self.cfg.train.dtype
        card = self.world.first_does(lambda: {**run_card(self.parts), "dtype": dtype})
        with self.signals, self.seen.running(self.step, card):
            for note in self.parts.notes:
                self.seen.note(note)
            return self._fit()

    def _fit(self) -> int:
        t = self.cfg.train
        if self.step == 0 and not self.evaluations:
            self._evaluate()
        elapsed, number = self._agree()
        done, saved = self.schedule.fraction(self.step, elapsed), None
        span = 0.0  # of a step, to place the learning rate of a timed run
        while not number and done < 1 and not self._stalled():
            fraction = self.schedule.fraction(self.step + 1, elapsed + span)
            row = self.train_step(self.schedule.lr(fraction))
            before = elapsed
            elapsed, number = self._agree()
            span = elapsed - before
            done = self.schedule.fraction(self.step, elapsed + span)
            last = bool(number) or done >= 1
            self._report(row, done, elapsed, last)
            if t.eval_every and self.step % t.eval_every == 0 and not last:
                saved = self._evaluate()
            elif number or (self.step % t.save_every == 0 and not last):
                saved = self._save()
        self.batches = None  # ends the reader
        self.seen.progress.close()
        if self.step == 0 and not number:
            raise EagleError(
                f"train.time_budget_minutes={t.time_budget_minutes:g} was over before the first "
                "step, and a head that learned nothing is not written; raise it"
            )
        if number:
            path = saved or self._save()
            self.seen.note(f"stopped at step {self.step}; continue with --resume; saved {path}")
            return 128 + number
        if self._tau_at(self.step) is None:
            self._evaluate()
        elif runs.pointed(self.output, "latest") is None:
            self._save()
        self.world.first_does(self._publish)
        return 0

    def _stalled(self) -> bool:
        """Has the acceptance length not risen for so many evaluations that the run is to end?"""
        patience = self.cfg.train.early_stopping_patience
        taus = [e["tau"] for e in self.evaluations if e["step"] > 0]
        if not patience or not taus or len(taus) - 1 - taus.index(max(taus)) < patience:
            return False
        self.seen.note(f"no better acceptance length in {patience} evaluations: the run ends")
        return True

    def _report(self, row: dict, done: float, elapsed: float, last: bool) -> None:
        logged = last or self.step == 1 or self.step % self.cfg.train.log_every == 0
        if logged and (sources := self.sources.take()):
            row["sources"] = sources
        self.row = row
        eta = elapsed * (1 - done) / done if 0 < done < 1 else 0.0
        self.seen.step(row, min(done, 1.0), eta, elapsed, keep=logged)

    def _publish(self) -> None:
        best = runs.pointed(self.output, "best") or runs.pointed(self.output, "latest")
        head, provenance = load_head(best / "head")
        save_head(head, self.output / "head", provenance)
        taus = [e["tau"] for e in self.evaluations]
        summary = {
            "steps": self.step,
            "rows_seen": self.rows_seen,
            "seconds": self.elapsed(),
            "final": {k: v for k, v in self.row.items() if k != "seconds"},
            "tau_before": taus[0] if taus else None,
            "tau_after": taus[-1] if taus else None,
            "best": {"checkpoint": best.name, "tau": self._tau_at(runs.step_of(best))},
            "evaluations": self.evaluations,
            **{name: self.parts.provenance[name] for name in ("draft_vocabulary", "data")},
            "paths": {n.split(".")[0]: str(self.output / n) for n in PATHS},
        }
        atomic_write_text(self.output / "summary.json", json.dumps(summary, indent=2) + "\n")
        if taus:
            said = f"{taus[0]:.2f} before, {taus[-1]:.2f} after"
            self.seen.note(f"acceptance length on held-out prompts: {said}")
        said = f"{self.step} steps in {clock(self.elapsed())}"
        self.seen.note(f"{said}; head: {self.output / 'head'}")

    def _tau_at(self, step: int) -> float | None:
        return next((e["tau"] for e in self.evaluations if e["step"] == step), None)

    # saving and evaluating

    def _export(self) -> DraftHead:
        """A full copy of the head in the dtype it trains in. All ranks must call it."""
        head = copy.deepcopy(self.blank)
        head.load_state_dict(self.engine.weights(), strict=False)  # the map is in the copy already
        return head.to(torch.bfloat16 if self.cfg.train.dtype == "bf16" else torch.float32)

    def _evaluate(self) -> Path | None:
        """Measure, remember, save, and point `best` at the checkpoint of the highest tau."""
        head = self._export()
        if self.parts.prompts:
            target = self.parts.target
            self.seen.progress.doing(f"step {self.step}: decoding held-out prompts")
            fit = copy.deepcopy(head).to(target.device, target.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = acceptance(target, fit, self.parts.prompts, self.cfg.eval, self.world)
            depths = " ".join(f"{a:.2f}" for a in result["acceptance_by_depth"])
            text = f"tau {result['tau']:.3f}, acceptance by depth {depths}"
            self.seen.note(f"held-out at step {self.step}: {text}")
            self.evaluations.append({"step": self.step, **result})
            self.seen.evaluation(self.evaluations[-1])
        if self.step == 0:
            return None
        path = self._save(head)
        self._point_best()
        return path

    def _point_best(self) -> None:
        """The latest of equals. Also when resumed: a kill may have come before the pointer."""
        folder = self.output / "checkpoints"
        kept = [e for e in self.evaluations if (folder / f"step-{e['step']}").is_dir()]
        if self.world.first and kept:
            best = max(kept, key=lambda e: (e["tau"], e["step"]))
            runs.point(self.output, "best", f"step-{best['step']}")

    def _save(self, head: DraftHead | None = None) -> Path:
        """All ranks must call it; rank 0 writes."""
        head, weights = head or self._export(), self.engine.weights()
        optimizer = self.engine.optimizer_state() if self.step else {}
        seen = {"step": self.step, "rows_seen": self.rows_seen}
        info = {
            **seen,
            "elapsed": self.elapsed(),
            "evaluations": self.evaluations,
            "row": self.row,
            "source_sums": self.sources.sums.tolist(),
            "identity": self.parts.identity,
            "world": {"size": self.world.size, "global_batch": self.steps.rows},
            "config": self.cfg.model_dump(mode="json"),
        }
        training = {
            **seen,
            "loss": self.row.get("loss"),
            "tau": self._tau_at(self.step),
            "ttt_steps": self.cfg.train.ttt_steps,
            "loss_name": self.cfg.loss.name,
            "dtype": self.cfg.train.dtype,
        }

        def write() -> Path:
            vocabulary = {"draft_ids": self.blank.draft_token_ids().cpu()}
            state = disk.TrainState(info, weights, optimizer, disk.rng_state(), vocabulary)
            provenance = {**self.parts.provenance, "training": training}
            path = disk.save_checkpoint(self.output, state, head, provenance)
            safe = (runs.pointed(self.output, name) for name in ("best", "latest"))
            runs.prune(self.output, self.cfg.train.save_total_limit, *safe)
            return path

        return self.world.first_does(write)
