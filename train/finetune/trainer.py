"""What all our trainers add to transformers' and TRL's: exact arithmetic, whole checkpoints, honest
ends.

    class Ours(RunTrainer, SFTTrainer): ...
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

from configs.deepspeed_presets import zero_preset
from eagle.checkpoint import atomic_dir
from eagle.errors import EagleError
from eagle.loading import read_record
from eagle.meter import Bar, Meter
from train.finetune.policy import trainable_state, write_adapter
from train.finetune.run import PREDICTIONS, Run
from train.runs import SAVING, MetricsLog, StopSignals, checkpoints, prune, trim_heap
from train.tracking.perf import memory

NEVER = 10**9  # steps; evaluations at the start and the end are asked for elsewhere


def begin(
    run: Run, card: dict, cls: type = TrainingArguments, attach: Any = None, **more: Any
) -> TrainingArguments:
    """A run's config as transformers' TrainingArguments, or TRL's, which take `more`. Then the
    model is loaded, which ZeRO 3 wants to be made after them. card and attach: see `Run.load`."""
    t = run.cfg.train
    if t.zero is not None:
        more["deepspeed"] = preset = zero_preset(t.zero)  # the adapter is its own fp32 master copy
        if t.zero == 3:
            preset["zero_optimization"].setdefault("stage3_param_persistence_threshold", 10_000)
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # since 5.23
    checkpointing = "activation_checkpointing" if new else "gradient_checkpointing"
    more[checkpointing] = t.gradient_checkpointing
    more[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    made = cls(
        output_dir=str(run.output / "checkpoints" / SAVING),  # moved from there when whole
        max_steps=t.max_steps or -1,
        num_train_epochs=t.epochs,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size or t.batch_size,
        gradient_accumulation_steps=t.grad_accum,
        learning_rate=t.lr,
        lr_scheduler_type="constant_with_warmup" if t.schedule == "constant" else t.schedule,
        warmup_steps=t.warmup_ratio,
        weight_decay=t.weight_decay,
        adam_beta1=t.betas[0],
        adam_beta2=t.betas[1],
        max_grad_norm=t.grad_clip,
        seed=t.seed,
        # bf16 is `Run.autocast`'s: given here, TRL and DeepSpeed round the adapter itself
        bf16=False,
        logging_steps=t.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=t.eval_every or NEVER,
        eval_on_start=run.resume is None,
        save_steps=t.save_every,
        metric_for_best_model="eval_loss",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=run.world.device.type == "cpu",
        ddp_find_unused_parameters=False,
        **more,
    )
    run.load(card, attach)
    return made


class Done(Exception):
    """The run that is resumed has all its steps."""


class Journal(TrainerCallback):
    """Writes what is logged, shows how far the run is, saves what is evaluated, and ends the run in
    order: at the last step, by the clock, or by a signal."""

    def __init__(self, run: Run, mixture: Any = None) -> None:
        self.run, self.mixture, self.stop = run, mixture, StopSignals()
        self.bar: Bar = Bar(quiet=True)
        self.spent = 0.0  # share of the time budget

    def on_train_begin(self, args, state, control, **kwargs):
        before = read_record(self.run.resume)["training"]["seconds"] if self.run.resume else 0
        self.began, step = time.monotonic() - before, state.global_step
        first = self.run.world.first
        if step >= state.max_steps:
            raise Done
        self.log = MetricsLog(self.run.output / "metrics.jsonl", step) if first else None
        quiet = self.run.quiet or not first
        self.bar = Meter("step", state.max_steps, "rows", step, quiet=quiet)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.mixture is not None:  # it has another order in each
            self.mixture.set_epoch(int(state.epoch or 0))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is None or "train_runtime" in logs:
            return
        self.log.write({"step": state.global_step, **logs})
        shown = " ".join(f"{k} {v:.4g}" for k, v in logs.items() if k != "epoch")
        self.bar.note(f"step {state.global_step}/{state.max_steps}  {shown}")

    def on_step_end(self, args, state, control, **kwargs):
        trim_heap(state.global_step, self.run.world.device)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.bar.add(1, rows * self.run.world.size)
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


class RunTrainer:
    """Put before a trainer of transformers or TRL. What is made of both has `measure() -> {loss,
    …}`, the numbers over all of `heldout`, which it gets by `shares`."""

    def __init__(
        self, run: Run, args: Any, rows: Any, heldout: Any, collate: Any, mixture: Any = None
    ) -> None:
        self.run, self.heldout, self.journal = run, heldout, Journal(run, mixture)
        patience = run.cfg.train.early_stopping_patience
        kept = [(p, p.detach().clone()) for p in run.model.parameters() if p.requires_grad]
        super().__init__(
            model=run.model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=rows,  # asked for, never read
            callbacks=[self.journal, *([EarlyStoppingCallback(patience)] if patience else [])],
            **({} if run.tasks else {"processing_class": copy.deepcopy(run.tokenizer)}),
        )
        for p, before in kept:  # TRL rounds the adapter of a quantized model to bf16
            p.data = before.to(p.device)
        self.remove_callback(PrinterCallback)

    def fit(self) -> int:
        """Train, publish, and return the exit code."""
        with self.journal.stop as stop:
            try:
                self.train(resume_from_checkpoint=self.run.resume and str(self.run.resume))
            except Done as done:
                had = f"{self.run.resume} has its {self.state.global_step} steps"
                if not checkpoints(self.run.output):
                    raise EagleError(f"{had}: raise train.max_steps or train.epochs") from done
                self.run.note(f"{had}: nothing is left to train")
            finally:
                self.journal.bar.close()
        if stop.number:
            step = self.state.global_step
            self.run.note(f"stopped by signal at step {step}; continue with --resume")
            return 128 + stop.number
        world = self.run.world
        [peak] = world.max([max(memory(world.device).values()) / 2**20])
        world.first_does(lambda: self.run.publish(self.state, peak))
        return 0

    def _get_train_sampler(self, train_dataset=None):
        """A mixture comes in its own order."""
        mixture = self.journal.mixture
        if mixture is not None and mixture.shuffled:
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """By the steps or by the clock, whichever is further. The first step learns: n of a warmup
        of w steps has n / w of the rate."""
        warm = self.args.get_warmup_steps(num_training_steps)

        def clocked(scale):
            def at(step):
                step = max(step, int(self.journal.spent * num_training_steps))
                return scale(step + (step < warm))

            return at

        made = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(made, LambdaLR):  # not yet wrapped by DeepSpeed
            made = LambdaLR(made.optimizer, list(map(clocked, made.lr_lambdas)))
            self.lr_scheduler = made
        return made

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """What the optimizer had learnt, with the settings of this run."""
        groups, schedule = self.optimizer.param_groups, self.lr_scheduler
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            schedule.base_lrs = [own["initial_lr"] for own in settings]
            scales = [scale(schedule.last_epoch) for scale in schedule.lr_lambdas]
            for group, own, n in zip(self.optimizer.param_groups, settings, scales, strict=True):
                group.update(own, lr=own["initial_lr"] * n)
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.run.autocast())
        return stack

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise EagleError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; lower train.lr or "
                "look at the data; the last checkpoint is whole"
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        began = time.perf_counter()
        self.journal.bar.doing(f"step {self.state.global_step}: measuring on held-out rows")
        self.model.eval()
        with torch.no_grad(), self.run.autocast():
            found = self.measure()
        found["seconds"] = time.perf_counter() - began
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(dict(metrics))
        told = self.args, self.state, self.control, metrics
        self.control = self.callback_handler.on_evaluate(*told)
        return metrics

    def shares(self) -> Iterator[tuple[list, torch.Tensor]]:
        """This rank's part of `heldout` in batches: (rows, which of them count). Every rank gets as
        many batches of as many rows, as ZeRO 3 needs; the ones too many do not count."""
        rows, world, size = len(self.heldout), self.run.world, self.args.per_device_eval_batch_size
        mine = range(world.rank, -(-rows // world.size) * world.size, world.size)
        for start in range(0, len(mine), size):
            numbers = mine[start : start + size]
            counted = torch.tensor([n < rows for n in numbers])
            yield [self.heldout[min(n, rows - 1)] for n in numbers], counted

    def collated(self, rows: list) -> dict[str, torch.Tensor]:
        return {k: v.to(self.run.world.device) for k, v in self.data_collator(rows).items()}

    # checkpoints

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's page about nothing; `adapter.card` is ours."""

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        run, state = self.run, trainable_state(self.model)
        if not self.args.should_save:
            return
        newest = {k: v for row in self.state.log_history for k, v in row.items()}
        training = {k: v for k, v in newest.items() if k in ("loss", "grad_norm") or "eval_" in k}
        seconds = time.monotonic() - self.journal.began
        training |= {"step": self.state.global_step, "epoch": self.state.epoch, "seconds": seconds}
        record = {**run.record, "training": training}
        write_adapter(Path(output_dir), self.model, state, run.tokenizer, record, run.tasks)
        if run.predictions:
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in run.predictions)
            (Path(output_dir) / PREDICTIONS).write_text(lines, encoding="utf-8")

    def _save_checkpoint(self, model, trial) -> None:
        run, staging = self.run, Path(self.args.output_dir)
        place = staging.with_name(f"checkpoint-{self.state.global_step}")
        best = staging.with_name(f"checkpoint-{self.state.best_global_step}")

        def publish() -> None:
            with atomic_dir(place) as whole:
                os.rename(staging / place.name, whole)
            prune(run.output, run.cfg.train.save_total_limit, best)

        try:
            super()._save_checkpoint(model, trial)
            run.world.wait()  # every rank has written its part
            run.world.first_does(publish)
        finally:
            if run.world.first:
                shutil.rmtree(staging, ignore_errors=True)


def token_losses(model: nn.Module, ids, attention, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, attention, mask [B, T] -> negative log-likelihoods in nats, fp32 and 0 where the mask is
    0, and whether the token was the likeliest: [B, T-1]."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    labels, kept = ids[:, 1:], mask[:, 1:].bool()
    logits = logits[kept].float()
    nll = F.cross_entropy(logits, labels[kept], reduction="none")
    right = logits.argmax(-1) == labels[kept]
    return nll.new_zeros(kept.shape).masked_scatter(kept, nll), kept.masked_scatter(kept, right)
