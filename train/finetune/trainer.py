"""What all our trainers add to transformers' and TRL's: exact arithmetic, whole checkpoints, honest
ends.

    class Ours(RunTrainer, SFTTrainer): ...
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from configs.deepspeed_presets import zero_preset
from eagle.checkpoint import atomic_dir
from eagle.errors import EagleError
from train.finetune import checkpoints as disk
from train.finetune.adapter import load_trainable, write_adapter
from train.finetune.journal import Journal
from train.finetune.policy import trainable_state
from train.finetune.run import Run

NEVER = 10**9  # steps; evaluations at the start and the end are asked for elsewhere
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def arguments(cls: type[Arguments], run: Run, **more: Any) -> Arguments:
    """A run's config as transformers' TrainingArguments, or TRL's, which take `more`."""
    t = run.cfg.train
    if t.zero is not None:
        more["deepspeed"] = preset = zero_preset(t.zero)  # the adapter is its own fp32 master copy
        if t.zero == 3:
            preset["zero_optimization"].setdefault("stage3_param_persistence_threshold", 10_000)
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # since 5.23
    checkpointing = "activation_checkpointing" if new else "gradient_checkpointing"
    more[checkpointing] = t.gradient_checkpointing
    more[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    return cls(
        output_dir=str(disk.folder_of(run.output)),
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
        greater_is_better=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=run.world.device.type == "cpu",
        ddp_find_unused_parameters=False,
        **more,
    )


class RunTrainer:
    """Put before a trainer of transformers or TRL. What is made of both has `measure() -> {loss,
    …}`, the numbers over all of `heldout`, which it gets by `shares`."""

    def __init__(self, run: Run, heldout: Any, mixture: Any = None, **options: Any) -> None:
        self.run, self.heldout, self.journal = run, heldout, Journal(run, mixture)
        self._staging: Path | None = None
        watching = [self.journal]
        if patience := run.cfg.train.early_stopping_patience:
            watching.append(EarlyStoppingCallback(patience))
        # before TRL adds the reference's adapter; a packed 4-bit weight counts what it stands for
        trainable, total = run.model.get_nb_trainable_parameters()
        run.record["trainable_parameters"] = trainable
        self.totals = {
            "trainable_parameters": trainable,
            "total_parameters": total,
            "trainable_share": trainable / total,
        }
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        options.setdefault("eval_dataset", options["train_dataset"])  # asked for, and never read
        super().__init__(model=run.model, callbacks=watching, **options)
        for name, p in run.model.named_parameters():
            if name in kept:  # TRL rounds the adapter of a quantized model to bf16
                p.data = kept[name].to(p.device)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)

    def fit(self) -> int:
        """Train, publish, and return the exit code."""
        stop = self.journal.stop
        with stop, self.journal.bar:
            self.train(resume_from_checkpoint=str(self.run.resume) if self.run.resume else None)
        if stop.number:
            step = self.state.global_step
            self.run.note(f"stopped by signal at step {step}; continue with --resume")
            return 128 + stop.number
        self.run.publish(self.state, self.totals)
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        t = self.run.cfg.train
        if t.time_budget_minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)

        def scale(step: int) -> float:
            """Of the learning rate, by the steps or by the clock, whichever is further."""
            done = min(max((step + 1) / num_training_steps, self.journal.spent), 1.0)
            cosine = (1 + math.cos(math.pi * done)) / 2
            falls = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}
            return min(done / max(t.warmup_ratio, 1e-9), 1.0) * falls[t.schedule]

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, scale)
        return self.lr_scheduler

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.run.autocast())
        return stack

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise EagleError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1} on rank "
                f"{self.run.world.rank}; lower train.lr or look at the data; the last checkpoint "
                "is whole"
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
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def shares(self) -> Iterator[tuple[list, torch.Tensor]]:
        """This rank's part of `heldout` in batches: (rows, which of them count)."""
        size = self.args.per_device_eval_batch_size
        for numbers, counted in shares(len(self.heldout), self.run.world, size):
            yield [self.heldout[n] for n in numbers], torch.tensor(counted)

    def collated(self, rows: list) -> dict[str, torch.Tensor]:
        return {k: v.to(self.run.world.device) for k, v in self.data_collator(rows).items()}

    # checkpoints

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's page about nothing; `adapter.card` is ours."""

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        run, state = self.run, trainable_state(self.model)
        if not self.args.should_save:
            return
        training: dict = {"step": self.state.global_step, "epoch": self.state.epoch}
        for row in self.state.log_history:  # the newest of each
            training |= {k: v for k, v in row.items() if k in ("loss", "grad_norm") or "eval_" in k}
        record = {**run.record, "training": training}
        write_adapter(Path(output_dir), self.model, state, run.tokenizer, record, run.tasks)
        self.save_more(Path(output_dir))

    def save_more(self, folder: Path) -> None:
        """Further files of a checkpoint; rank 0 calls it."""

    def _save_checkpoint(self, model, trial) -> None:
        world, state, output = self.run.world, self.state, self.run.output
        folder, name = disk.folder_of(output), f"checkpoint-{state.global_step}"
        best = f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        self._staging = folder / ".saving"

        def publish() -> None:
            state.save_to_json(str(self._staging / name / disk.STATE))
            with atomic_dir(folder / name) as whole:
                os.rename(self._staging / name, whole)
            disk.prune(output, self.run.cfg.train.save_total_limit, best)

        world.first_does(lambda: disk.clear(output))
        try:
            super()._save_checkpoint(model, trial)
            world.wait()  # every rank has written its part
            state.best_model_checkpoint = str(folder / best) if best else None
            world.first_does(publish)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise EagleError(
                f"cannot write {folder / name}: {reason}; the checkpoint before it is whole"
            ) from error
        finally:
            if world.first:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))


def shares(rows: int, world, batch_size: int) -> list[tuple[list[int], list[bool]]]:
    """This rank's part of `rows` in batches: (row numbers, which of them count). Every rank gets as
    many batches of as many rows, as ZeRO 3 needs; the ones too many do not count."""
    each = range(world.rank, -(-rows // world.size) * world.size, world.size)
    mine = [(min(n, rows - 1), n < rows) for n in each]
    parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return [tuple(map(list, zip(*part, strict=True))) for part in parts]


def token_losses(
    model: nn.Module, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, attention, mask [B, T] -> negative log-likelihoods in nats, fp32 and 0 where the mask is
    0, and whether the token was the likeliest: [B, T-1]."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    labels, kept = ids[:, 1:], mask[:, 1:].bool()
    logits = logits[kept].float()
    nll = F.cross_entropy(logits, labels[kept], reduction="none")
    right = logits.argmax(-1) == labels[kept]
    return nll.new_zeros(kept.shape).masked_scatter(kept, nll), kept.masked_scatter(kept, right)


def pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
