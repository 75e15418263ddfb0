"""What every fine-tuning run has, whatever it learns by: its folder, its ranks, its record and its
report.

    OUTPUT/config.yaml  metrics.jsonl  summary.json  quarantine*.jsonl  predictions.jsonl
    OUTPUT/checkpoints/  see checkpoints.py
    OUTPUT/adapter/      the best adapter, see adapter.py

Knows folders and records; knows nothing of losses.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.finetune_schema import PolicyConfig
from eagle.checkpoint import atomic_dir, atomic_write_text
from eagle.errors import EagleError
from eagle.loading import find_adapter, read_record, require_base, resolve_compute
from eagle.meter import Bar
from records import load_tokenizer
from records.tokens import tokenizer_hash
from train.finetune import checkpoints as disk
from train.finetune.adapter import adapter_bytes
from train.finetune.policy import base_fingerprint, base_name, base_path, build_policy
from train.head.distributed import World, join_world
from train.head.state import require_writable, write_config

PREDICTIONS = "predictions.jsonl"
# files of a checkpoint that make up the adapter folder; the rest is there to resume
RESUME_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "global_step*",
    "latest",
    "zero_to_*.py",
    PREDICTIONS,
)


@dataclass
class Run:
    """One run on this rank. `cfg` is one of the configs of `finetune_schema`."""

    cfg: Any
    method: str
    world: World
    output: Path
    quiet: bool = False
    resume: Path | None = None
    tokenizer: Any = None
    model: Any = None
    record: dict = field(default_factory=dict)
    tasks: list[dict] | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def amp(self) -> bool:
        return self.cfg.model.compute == "bf16"

    def autocast(self):
        """The arithmetic of training and evaluation: bf16 products, fp32 adapter weights and
        sums.
        """
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.amp)

    def note(self, text: str) -> None:
        if not self.quiet and self.world.first:
            print(text, flush=True)

    def prepare(self) -> None:
        """The tokenizer, and what an adapter of this run will say of its base; before the data is
        read.
        """
        m = self.cfg.model
        self.tokenizer = load_tokenizer(m.base)
        found = base_fingerprint(m.base)
        self.record = {
            "method": self.method,
            "base": {"id": base_name(m.base), "fingerprint": found},
            "quantization": m.quantization,
            "compute": m.compute,
            "tokenizer": tokenizer_hash(self.tokenizer),
        }
        if m.adapter is not None:
            folder = find_adapter(m.adapter)
            before = read_record(folder)
            require_base(folder, before, base_path(m.base), found)
            self.record["started_from"] = before.get("fingerprint") or str(folder)

    def settle(self, **values: str) -> None:
        """Put what "auto" means into the config."""
        self.cfg = self.cfg.model_copy(update={"model": self.cfg.model.model_copy(update=values)})

    def trainer_tokenizer(self) -> Any:
        """A copy for a trainer, which may change it; what is saved is the base's own."""
        return copy.deepcopy(self.tokenizer)

    def build_model(self) -> None:
        m = self.cfg.model
        start = find_adapter(m.adapter) if m.adapter is not None else None
        with Bar(self.quiet or not self.world.first) as bar:
            bar.doing("loading the base model")
            self.model = build_policy(m, self.cfg.lora, self.cfg.train.seed, start)
        weights = str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        self.settle(dtype=weights)
        self.record["dtype"] = weights
        if self.cfg.train.gradient_checkpointing:
            # the frozen embedding gives no gradient to recompute along; the trainer turns the rest
            # on
            self.model.enable_input_require_grads()
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and self.cfg.data.max_length > limit:
            raise EagleError(
                f"data.max_length={self.cfg.data.max_length} exceeds the {limit} positions of "
                f"{base_path(m.base)}; lower it"
            )

    def identify(self, data: dict) -> None:
        """`data`: what the data card says. Fixes what a resumed run must share with this one."""
        self.record["data"] = data
        lora = {k: v for k, v in self.cfg.lora.model_dump(mode="json").items() if k != "dropout"}
        identity = {
            "base": self.record["base"]["fingerprint"],
            "quantization": self.record["quantization"],
            "adapter": self.record.get("started_from") or lora,
            "data": {k: v for k, v in data.items() if isinstance(v, (int, str))},
            "train.seed": self.cfg.train.seed,
            "tasks": self.tasks,
        }
        self.record["identity"] = json.loads(json.dumps(identity))
        if self.resume is not None:
            disk.require_same_run(self.resume, self.record["identity"])
        if self.world.first:
            write_config(self.output, self.cfg)

    def finish(self, trainer: Any, totals: dict) -> dict:
        """Publish the best adapter and the summary; rank 0 writes. Returns the summary."""
        memory = self.world.max([peak_memory_mb()])[0]
        return self.world.first_does(lambda: self._publish(trainer.state, totals, memory))

    def _publish(self, state: Any, totals: dict, memory: float) -> dict:
        best = best_checkpoint(self.output, state)
        with atomic_dir(self.output / "adapter") as folder:
            shutil.copytree(
                best, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*RESUME_FILES)
            )
        if (best / PREDICTIONS).exists():
            text = (best / PREDICTIONS).read_text(encoding="utf-8")
            atomic_write_text(self.output / PREDICTIONS, text)
        evaluations = [row for row in state.log_history if "eval_loss" in row]
        summary = {
            "method": self.method,
            "steps": state.global_step,
            "epochs": state.epoch,
            "seconds": time.monotonic() - self.started,
            **totals,
            "adapter_bytes": adapter_bytes(self.output / "adapter"),
            "peak_memory_mb": memory,
            "heldout_before": _scores(evaluations[0]) if evaluations else None,
            "heldout_after": _scores(
                next((e for e in evaluations if e["step"] == disk.step_of(best)), {})
            ),
            "best": {"checkpoint": best.name, "eval_loss": state.best_metric},
            "data": self.record["data"],
            "paths": {
                "adapter": str(self.output / "adapter"),
                "metrics": str(self.output / "metrics.jsonl"),
                "checkpoints": str(disk.folder_of(self.output)),
            },
        }
        atomic_write_text(self.output / "summary.json", json.dumps(summary, indent=2) + "\n")
        self._tell(summary)
        return summary

    def _tell(self, summary: dict) -> None:
        before, after = summary["heldout_before"], summary["heldout_after"]
        if before and after:
            names = [n for n in after if n in before]
            shown = [f"{n} {before[n]:.4g} -> {after[n]:.4g}" for n in names]
            self.note("held out, before -> after: " + ", ".join(shown))
        self.note(
            f"{summary['steps']} steps in {summary['seconds']:.0f} s; "
            f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters trained, "
            f"adapter {summary['adapter_bytes'] / 2**20:.1f} MiB, peak memory "
            f"{summary['peak_memory_mb']:.0f} MB: {summary['paths']['adapter']}"
        )


def start(cfg: Any, method: str, quiet: bool = False) -> Run:
    """Join the ranks, choose the folder, and find what to resume."""
    launched = "RANK" in os.environ

    def claim() -> tuple[Path, Path | None]:
        output = choose_output(cfg.train.output, method, cfg.train.resume)
        resume = disk.find(output, cfg.train.resume) if cfg.train.resume else None
        require_writable(output)
        disk.clear(output)
        return output, resume

    world = join_world() if launched or cfg.train.zero is not None else World(0, 1, _device())
    output, resume = world.first_does(claim)
    if not world.first:
        logging.getLogger("records").setLevel(logging.ERROR)
    run = Run(cfg, method, world, output, quiet, resume)
    run.settle(**dtypes(cfg.model, world.device, resume))
    return run


def dtypes(model: PolicyConfig, device: torch.device, resume: Path | None) -> dict[str, str]:
    """What `dtype` and `compute` are to be. A run that is resumed keeps its own: what "auto" meant
    where it began, another machine may read otherwise."""
    found = {}
    for name in ("dtype", "compute"):
        found[name] = asked = getattr(model, name)
        had = read_record(resume).get(name) if resume is not None else None
        if had is not None and asked not in ("auto", had):
            raise EagleError(
                f"{resume} belongs to a run with model.{name}={had}, not {asked}; leave model.{name} out, or start a "
                "new run with another --output"
            )
        found[name] = had or asked
    return {**found, "compute": resolve_compute(found["compute"], device)}


def execute(cfg: Any, method: str, body: Any, quiet: bool = False) -> int:
    """`body(run)`, whose failure leaves no folder behind that holds nothing."""
    fresh = not holds_anything(cfg, method)
    run = start(cfg, method, quiet)
    try:
        return body(run)
    except (EagleError, ConfigError):
        if fresh and run.world.first and not _worth_keeping(run.output):
            shutil.rmtree(run.output, ignore_errors=True)
        raise


def holds_anything(cfg: Any, method: str) -> bool:
    return choose_output(cfg.train.output, method, cfg.train.resume).exists()


def _worth_keeping(output: Path) -> bool:
    return bool(list(output.glob("*.jsonl"))) or bool(disk.checkpoints(output))


def choose_output(output: str | None, method: str, resume: str | None) -> Path:
    """The run's folder. Without a name: `runs/METHOD`, numbered when taken; resuming takes the
    last.
    """
    if resume not in (None, "auto"):
        given = Path(resume)
        return Path(output or (given.parent.parent if disk.NAME.fullmatch(given.name) else given))
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and not path.is_dir():
            raise EagleError(f"--output {path} is a file; name a folder")
        if resume is None and holds_run(path):
            raise EagleError(
                f"{path} already holds a run; continue it with --resume, or choose another --output"
            )
        return path
    base = Path("runs") / method
    names = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000))]
    if resume is not None:
        taken = [path for path in names if holds_run(path)]
        return taken[-1] if taken else base
    return next(path for path in names if not holds_run(path))


def holds_run(path: Path) -> bool:
    found = any((path / name).exists() for name in ("summary.json", "adapter"))
    return found or bool(disk.checkpoints(path))


def best_checkpoint(output: Path, state: Any) -> Path:
    """The one of the lowest held-out loss, or the newest where nothing was evaluated."""
    found = disk.checkpoints(output)
    name = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
    return next((path for path in found if path.name == name), found[-1])


def peak_memory_mb() -> float:
    """Most memory in use at once: allocated on the GPU, or the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _scores(row: dict) -> dict:
    """What an evaluation found, without `eval_` and what it cost."""
    found = {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
    return {k: v for k, v in found.items() if k not in ("seconds", "tokens")}


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
