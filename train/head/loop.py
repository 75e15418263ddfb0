"""The training loop: rows -> target -> unrolled head -> update, with evaluations and checkpoints.

Knows the order of things; what each thing is, the modules beside it know.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text, load_head, save_head
from eagle.errors import EagleError
from eagle.head import Eagle3Head
from train.data import Collator
from train.head import state as disk
from train.head.distributed import World
from train.head.engine import Engine
from train.head.evaluate import acceptance
from train.head.metrics import COLUMNS, MetricsLog, Progress, clock, depth_metrics
from train.head.order import RowOrder, share_of
from train.head.schedule import Schedule
from train.head.setup import Parts, build
from train.head.ttt import UnrolledHead, plan_unroll, teach

PHASES = ("data", "target", "head", "backward", "step")


class Trainer:
    """One run. `fit()` returns the process's exit code."""

    def __init__(
        self, cfg: HeadTrainConfig, output: Path, world: World, quiet: bool = False
    ) -> None:
        self.cfg, self.output, self.world = cfg, output, world
        resumed = disk.find_checkpoint(output, cfg.train.resume) if cfg.train.resume else None
        if not world.first:
            logging.getLogger("train.data").setLevel(logging.ERROR)  # said once is enough
            world.wait()  # the first rank fills the data cache
        parts = build(cfg, output if world.first else None, world.device)
        if world.first:
            world.wait()
        self.parts: Parts = parts
        if resumed is not None:
            disk.require_same_run(resumed, json.loads(json.dumps(parts.identity)))
            with torch.no_grad():
                for name, p in parts.head.named_parameters():
                    p.copy_(resumed.weights[name])
        self.draft_ids = parts.head.draft_token_ids().to(world.device)
        self.in_draft = torch.zeros(parts.target.vocab_size, dtype=torch.bool, device=world.device)
        self.in_draft[self.draft_ids] = True
        self.blank = copy.deepcopy(
            parts.head
        )  # keeps the map and shapes where ZeRO splits the weights
        t = cfg.train
        module = UnrolledHead(
            parts.head.to(world.device), t.ttt_steps, t.ttt_decay, cfg.loss, t.dtype == "bf16"
        )
        self.module = module
        self.engine = Engine(module, cfg, world)
        self.global_batch = world.size * t.batch_size * t.grad_accum
        self.schedule = Schedule.of(t, len(parts.data), self.global_batch)
        self.order = RowOrder(len(parts.data), t.seed)
        self.collate = Collator(parts.pad_id, pad_to_multiple=8)
        self.step, self.rows_seen, self.elapsed_before = 0, 0, 0.0
        self.evaluations: list[dict] = []
        self.epoch = 0
        if resumed is not None:
            self._restore(resumed)
        self.progress = Progress(self.schedule.total, quiet=quiet or not world.first)
        self.log = MetricsLog(output / "metrics.jsonl", self.step) if world.first else None
        self.row: dict = {}
        self.signal = 0

    def _restore(self, resumed: disk.TrainState) -> None:
        info = resumed.info
        self.step, self.rows_seen = info["step"], info["rows_seen"]
        self.elapsed_before, self.evaluations = info["elapsed"], info["evaluations"]
        if resumed.optimizer:
            self.engine.load_optimizer_state(resumed.optimizer, prime=self._prime)
        disk.set_rng_state(resumed.rng, info["rng"])

    def _prime(self) -> None:
        for batch, totals, _ in self._batches(self.rows_seen, [0.0] * len(PHASES)):
            loss, _ = self._forward(batch, totals, [0.0] * len(PHASES))
            self.engine.micro(loss)
            self.engine.step()  # at learning rate 0

    # one step

    def _rows(self, start: int) -> list[list[tuple[int, int]]]:
        t = self.cfg.train
        rows = self.order.take(start, self.global_batch)
        return share_of(rows, self.world.rank, self.world.size, t.batch_size, t.grad_accum)

    def _read(self, place: tuple[int, int]) -> dict:
        epoch, row = place
        if epoch != self.epoch:
            self.parts.data.set_epoch(epoch)
            self.epoch = epoch
        return self.parts.data[row]

    def _batches(self, start: int, times: list[float]):
        """This rank's micro-batches of the step from row `start` on, and the whole step's [S] targets."""
        began = time.perf_counter()
        steps, batches = self.cfg.train.ttt_steps, []
        for places in self._rows(start):
            batch = self.collate([self._read(place) for place in places])
            if int(batch["input_ids"].max()) >= self.parts.target.vocab_size:
                raise EagleError(
                    f"rows {[row for _, row in places]} hold token ids outside the target's vocabulary of "
                    f"{self.parts.target.vocab_size}; the data was made with another tokenizer"
                )
            mask = batch["attention_mask" if self.cfg.loss.tokens == "all" else "loss_mask"]
            batches.append((batch, plan_unroll(mask, steps), places))
        totals = self.world.sum(torch.stack([plan.counts for _, plan, _ in batches]).sum(0))
        totals = totals.to(self.world.device, torch.float32)
        times[0] += time.perf_counter() - began
        for batch, plan, places in batches:
            yield (batch, plan.to(self.world.device)), totals, places

    def _forward(self, batch, totals, times: list[float]):
        batch, plan = batch
        target, device, began = self.parts.target, self.world.device, time.perf_counter()
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.no_grad():
            hidden, features = target.hidden_and_features(ids, mask.long())
            embeds = target.embed(ids)
            teacher = teach(target, hidden, plan, self.draft_ids, self.in_draft)
        times[1] += time.perf_counter() - began
        began = time.perf_counter()
        loss, sums = self.engine(features, embeds, plan, teacher, totals)
        times[2] += time.perf_counter() - began
        return loss, sums

    def _train_step(self, lr: float) -> dict:
        times = [0.0] * len(PHASES)
        started = time.perf_counter()
        self.engine.set_lr(lr)
        sums = torch.zeros(self.cfg.train.ttt_steps, len(COLUMNS), dtype=torch.float64)
        tokens, norm = 0, 0.0
        for batch, totals, places in self._batches(self.rows_seen, times):
            loss, part = self._forward(batch, totals, times)
            self._require_finite(float(loss.detach()), places)
            began = time.perf_counter()
            self.engine.micro(loss)
            times[3] += time.perf_counter() - began
            began = time.perf_counter()
            norm = self.engine.step()
            times[4] += time.perf_counter() - began
            sums += part.double().cpu()
            tokens += int(batch[0]["attention_mask"].sum())
        self._require_finite(norm, places)
        sums = self.world.sum(sums)
        tokens = int(self.world.sum(torch.tensor([tokens])))
        self.step += 1
        self.rows_seen += self.global_batch
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "epoch": self.rows_seen / len(self.parts.data),
            **depth_metrics(sums, self.cfg.train.ttt_decay),
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "steps_per_second": 1 / seconds,
            "seconds": dict(zip(PHASES, times, strict=True)),
        }

    def _require_finite(self, value: float, places: list[tuple[int, int]]) -> None:
        if self.world.max([0.0 if math.isfinite(value) else 1.0])[0]:
            rows = [row for _, row in places]
            raise EagleError(
                f"the loss or gradient is {value} at step {self.step + 1}, "
                f"rows {rows} on rank {self.world.rank}; "
                "lower train.lr or look at those rows with train.inspect; the last checkpoint is whole"
            )

    # the run

    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def _agree(self) -> tuple[float, int]:
        """Elapsed seconds and signal, the same on every rank."""
        elapsed, number = self.world.max([self.elapsed(), float(self.signal)])
        return elapsed, int(number)

    def fit(self) -> int:
        t = self.cfg.train
        self.started = time.monotonic()
        if self.step == 0:
            self._evaluate()
        elapsed, number = self._agree()
        span = 0.0  # of a step, to place the learning rate of a timed run in its middle
        saved = None
        with self._signals():
            while not number and self.schedule.fraction(self.step, elapsed) < 1:
                ahead = 1 if self.schedule.total else 0
                fraction = self.schedule.fraction(self.step + ahead, elapsed + span)
                row = self._train_step(self.schedule.lr(fraction))
                before = elapsed
                elapsed, number = self._agree()
                span = elapsed - before if self.schedule.budget else 0.0
                done = self.schedule.fraction(self.step, elapsed + span)
                last = number or done >= 1
                self._report(row, done, elapsed, bool(last))
                due = t.eval_every and self.step % t.eval_every == 0
                if due and not last:
                    saved = self._evaluate()
                elif number or (self.step % t.save_every == 0 and not last):
                    saved = self._save()
                if done >= 1:
                    break
        self.progress.close()
        if number:
            saved = saved or self._save()
            self.progress.note(
                f"stopped by signal at step {self.step}; continue with --resume; saved {saved}"
            )
            return 128 + number
        return self._finish()

    def _report(self, row: dict, done: float, elapsed: float, last: bool) -> None:
        self.row = row
        eta = elapsed * (1 - done) / done if 0 < done < 1 else 0.0
        self.progress.update(self.step, min(done, 1.0), eta, row)
        if self.log and (last or self.step == 1 or self.step % self.cfg.train.log_every == 0):
            self.log.write({**row, "elapsed": elapsed})

    def _finish(self) -> int:
        if not self.evaluations or self.evaluations[-1]["step"] != self.step:
            self._evaluate()
        elif disk.pointed(self.output, "latest") is None:
            self._save()
        if self.world.first:
            best = disk.pointed(self.output, "best") or disk.pointed(self.output, "latest")
            head, provenance = load_head(best / "head")
            save_head(head, self.output / "head", provenance)
            summary = self._summary(best)
            atomic_write_text(self.output / "summary.json", json.dumps(summary, indent=2) + "\n")
            if self.evaluations:
                first, final = self.evaluations[0]["tau"], self.evaluations[-1]["tau"]
                self.progress.note(
                    f"acceptance length on held-out prompts: {first:.2f} before, {final:.2f} after"
                )
            self.progress.note(
                f"{self.step} steps in {clock(self.elapsed())}; head: {self.output / 'head'}"
            )
        self.world.wait()
        return 0

    def _summary(self, best: Path) -> dict:
        taus = [e["tau"] for e in self.evaluations]
        return {
            "steps": self.step,
            "rows_seen": self.rows_seen,
            "seconds": self.elapsed(),
            "final": {k: v for k, v in self.row.items() if k != "seconds"},
            "tau_before": taus[0] if taus else None,
            "tau_after": taus[-1] if taus else None,
            "best": {"checkpoint": best.name, "tau": max(taus[1:], default=None)},
            "evaluations": self.evaluations,
            "draft_vocabulary": self.parts.vocabulary,
            "data": self.parts.provenance["data"],
            "paths": {
                "head": str(self.output / "head"),
                "metrics": str(self.output / "metrics.jsonl"),
                "checkpoints": str(self.output / "checkpoints"),
            },
        }

    # saving and evaluating

    def _export(self) -> Eagle3Head:
        """A full copy of the head in the dtype it trains in. All ranks must call it."""
        head = copy.deepcopy(self.blank)
        head.load_state_dict(self.engine.weights(), strict=False)  # the map is in the copy already
        return head.to(torch.bfloat16 if self.cfg.train.dtype == "bf16" else torch.float32)

    def _evaluate(self) -> Path | None:
        """Measure, remember, and point `best` at the checkpoint of the highest acceptance length."""
        head = self._export()
        if self.world.first and self.parts.prompts:
            target = self.parts.target
            fit = copy.deepcopy(head).to(target.device, target.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = acceptance(target, fit, self.parts.prompts, self.cfg.eval)
            self.evaluations.append({"step": self.step, **result})
            depths = " ".join(f"{a:.2f}" for a in result["acceptance_by_depth"])
            self.progress.note(
                f"held-out at step {self.step}: tau {result['tau']:.3f}, acceptance by depth {depths}"
            )
        if self.step == 0:
            self.world.wait()
            return None
        path = self._save(head)
        trained = [e for e in self.evaluations if e["step"] > 0]
        if self.world.first and trained and trained[-1]["tau"] >= max(e["tau"] for e in trained):
            atomic_write_text(self.output / "checkpoints" / "best", path.name + "\n")
        return path

    def _save(self, head: Eagle3Head | None = None) -> Path:
        """All ranks must call it; rank 0 writes."""
        head = head or self._export()
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        path = self.output / "checkpoints" / f"step-{self.step}"
        if self.world.first:
            rng, rest = disk.rng_state()
            info = {
                "step": self.step, "rows_seen": self.rows_seen, "elapsed": self.elapsed(),
                "evaluations": self.evaluations, "identity": self.parts.identity, "rng": rest,
                "world": {"size": self.world.size, "global_batch": self.global_batch},
                "config": self.cfg.model_dump(mode="json"),
            }  # fmt: skip
            loss = self.row.get("loss")
            tau = next((e["tau"] for e in self.evaluations if e["step"] == self.step), None)
            training = {"step": self.step, "rows_seen": self.rows_seen, "loss": loss, "tau": tau,
                        "ttt_steps": self.cfg.train.ttt_steps, "loss_name": self.cfg.loss.name}  # fmt: skip
            provenance = {**self.parts.provenance, "training": training}
            disk.save_checkpoint(
                self.output, disk.TrainState(info, weights, optimizer, rng), head, provenance
            )
            disk.prune(self.output, self.cfg.train.save_total_limit)
        self.world.wait()
        return path

    @contextmanager
    def _signals(self):
        """Ctrl-C and SIGTERM end the run at the next step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, frame):
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number

        kept = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in kept.items():
                signal.signal(s, handler)
