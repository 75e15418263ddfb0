"""What all our trainers add to transformers' and TRL's: exact arithmetic, whole checkpoints, honest
ends.

    class Ours(RunTrainer, SFTTrainer): ...

Knows trainers and ranks; what is learned, the modules beside it know.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from configs.deepspeed_presets import zero_preset
from eagle.errors import EagleError
from eagle.meter import Bar, remaining
from train.finetune import checkpoints as disk
from train.finetune.adapter import load_trainable, write_adapter
from train.finetune.policy import parameter_counts, trainable_state
from train.finetune.run import Run
from train.head.guards import trim_heap
from train.head.metrics import MetricsLog

NEVER = 10**9  # steps; evaluations at the start and the end are asked for elsewhere


def arguments(run: Run) -> dict[str, Any]:
    """What transformers' TrainingArguments (and TRL's) take, from a run's config."""
    t = run.cfg.train
    options = dict(
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
        **checkpointing(t.gradient_checkpointing),
        # bf16 is ours to switch on (`Run.autocast`): given here, TRL and DeepSpeed round the
        # adapter itself
        bf16=False,
        fp16=False,
        logging_strategy="steps",
        logging_steps=t.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=t.eval_every or NEVER,
        eval_on_start=run.resume is None,
        save_strategy="steps",
        save_steps=t.save_every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=run.world.device.type == "cpu",
        ddp_find_unused_parameters=False,
    )
    if t.zero is not None:
        options["deepspeed"] = trainer_preset(t.zero)
    return options


def checkpointing(on: bool) -> dict[str, Any]:
    """Under the name that this transformers has for it: 5.23 renamed it."""
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False} if on else None}


def trainer_preset(stage: int) -> dict:
    """The preset of head training with "auto" for the trainer to fill in; the adapter stays in
    fp32, which is its own master copy."""
    preset = zero_preset(stage)
    if stage == 3:
        preset["zero_optimization"].setdefault("stage3_param_persistence_threshold", 10_000)
    return preset


class RunTrainer:
    """Put before a trainer of transformers or TRL. What is made of both has `measure`: the held-out
    numbers, `loss` among them."""

    measure: Callable[[], dict[str, float]]

    def __init__(self, run: Run, **options: Any) -> None:
        self.run = run
        self._staging: Path | None = None
        self.journal = Journal(run)
        watching: list[TrainerCallback] = [self.journal]
        if patience := run.cfg.train.early_stopping_patience:
            watching.append(EarlyStoppingCallback(patience))
        self.totals = parameter_counts(run.model)  # before TRL adds the reference's adapter
        run.record["trainable_parameters"] = self.totals["trainable_parameters"]
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        super().__init__(model=run.model, callbacks=watching, **options)
        with torch.no_grad():  # TRL rounds the adapter of a quantized model to bf16
            for name, p in run.model.named_parameters():
                if name in kept:
                    p.data = kept[name].to(p.device)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)

    def fit(self) -> int:
        """Train, publish, and return the exit code."""
        stop = self.journal
        with stop.signals(), stop.bar:
            self.train(resume_from_checkpoint=str(self.run.resume) if self.run.resume else None)
        if stop.signal:
            self.run.note(
                f"stopped by signal at step {self.state.global_step}; continue with --resume"
            )
            return 128 + stop.signal
        self.run.finish(self, self.totals)
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        t = self.run.cfg.train
        if t.time_budget_minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)

        def scale(step: int) -> float:
            """Of the learning rate: the schedule goes by the steps or by the clock, whichever is
            further.
            """
            done = min(max((step + 1) / num_training_steps, self.journal.spent), 1.0)
            falls = {
                "constant": 1.0,
                "linear": 1 - done,
                "cosine": (1 + math.cos(math.pi * done)) / 2,
            }
            return (
                min(done / t.warmup_ratio, 1.0) * falls[t.schedule]
                if t.warmup_ratio
                else falls[t.schedule]
            )

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, scale)
        return self.lr_scheduler

    # arithmetic

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.run.autocast())
        return stack

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise EagleError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1} on rank "
                f"{self.run.world.rank}; lower train.lr or look at the data; the last checkpoint is whole"
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

    # checkpoints

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's page about nothing; `adapter.card` is ours."""

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        run, state = self.run, trainable_state(self.model)
        if not self.args.should_save:
            return
        last = {
            k: v for k, v in _last(self.state.log_history).items() if isinstance(v, (int, float))
        }
        training = {"step": self.state.global_step, "epoch": self.state.epoch, **last}
        record = {**run.record, "training": training}
        write_adapter(Path(output_dir), self.model, state, run.tokenizer, record, run.tasks)
        self.save_more(Path(output_dir))

    def save_more(self, folder: Path) -> None:
        """Further files of a checkpoint; rank 0 calls it."""

    def _save_checkpoint(self, model, trial) -> None:
        world, state = self.run.world, self.state
        name = f"checkpoint-{state.global_step}"
        folder = disk.folder_of(self.run.output)
        final, self._staging = folder / name, folder / disk.SAVING

        def begin() -> None:
            disk.clear(self.run.output)
            self._staging.mkdir(parents=True, exist_ok=True)

        def publish() -> None:
            state.save_to_json(str(self._staging / name / disk.STATE))
            disk.publish(self._staging / name, final)
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            disk.prune(self.run.output, self.run.cfg.train.save_total_limit, best)

        world.first_does(begin)
        try:
            super()._save_checkpoint(model, trial)
            world.wait()  # every rank has written its part
            if state.best_global_step:
                best = folder / f"checkpoint-{state.best_global_step}"
                state.best_model_checkpoint = str(best)
            world.first_does(publish)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise EagleError(
                f"cannot write {final}: {reason}; the checkpoint before it is whole"
            ) from error
        finally:
            if world.first:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))


class Journal(TrainerCallback):
    """Writes what is logged, saves what is evaluated, ends a run in order when a signal comes."""

    def __init__(self, run: Run) -> None:
        self.run, self.signal = run, 0
        self.log: MetricsLog | None = None
        self.bar = Bar(run.quiet or not run.world.first)
        self.began: tuple[float, int] | None = None
        self.found = ""
        self.spent = 0.0  # share of the time budget

    def on_train_begin(self, args, state, control, **kwargs):
        if self.run.world.first:
            self.log = MetricsLog(self.run.output / "metrics.jsonl", state.global_step)
        self.began = time.monotonic(), state.global_step
        self.tell(state)

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
        began, first = self.began
        share = (state.global_step - first) / max(state.max_steps - first, 1)
        seconds = time.monotonic() - began
        rate = f"{(state.global_step - first) / max(seconds, 1e-9):.3g} steps/s"
        self.bar.show(
            f"step {state.global_step}/{state.max_steps}",
            state.global_step / max(state.max_steps, 1),
            f"{self.found}  {rate}  ETA {remaining(seconds, share)}".strip(),
            now=now,
        )

    def on_step_end(self, args, state, control, **kwargs):
        trim_heap(state.global_step, self.run.world.device)
        self.tell(state)
        budget = 60 * (self.run.cfg.train.time_budget_minutes or math.inf)
        spent = (time.monotonic() - self.began[0]) / budget
        self.spent, number = self.run.world.max([spent, float(self.signal)])  # alike on all ranks
        if number := int(number):
            self.signal = number
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

    @contextmanager
    def signals(self) -> Iterator[None]:
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


def shares(rows: int, world, batch_size: int) -> list[tuple[list[int], list[bool]]]:
    """This rank's part of `rows` in batches: (row numbers, which of them count). Every rank gets as
    many batches of as many rows, as ZeRO 3 needs; the ones too many do not count."""
    each = -(-rows // world.size)
    mine = [(n * world.size + world.rank) for n in range(each)]
    counts = [n < rows for n in mine]
    mine = [min(n, rows - 1) for n in mine]
    starts = range(0, each, batch_size)
    return [(mine[s : s + batch_size], counts[s : s + batch_size]) for s in starts]


def _last(history: list[dict]) -> dict:
    """The newest training and evaluation numbers that were logged."""
    out: dict = {}
    for row in history:
        out |= {k: v for k, v in row.items() if k in ("loss", "grad_norm") or k.startswith("eval_")}
    return out
