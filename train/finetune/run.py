"""What every fine-tuning run has, whatever it learns by: its folder, its ranks, its record and its
report.

    OUTPUT/config.yaml  metrics.jsonl  summary.json  quarantine*.jsonl  predictions.jsonl
    OUTPUT/checkpoints/  see checkpoints.py
    OUTPUT/adapter/      the best adapter, see adapter.py
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from eagle.checkpoint import atomic_dir, atomic_write_text
from eagle.errors import EagleError
from eagle.loading import find_adapter, read_record, require_base, resolve_compute, resolve_device
from eagle.meter import Bar
from records import load_tokenizer
from records.tokens import tokenizer_hash
from train.finetune import checkpoints as disk
from train.finetune.adapter import adapter_bytes
from train.finetune.policy import base_fingerprint, base_name, build_policy
from train.head.distributed import World, join_world
from train.runs import require_writable, write_config

PREDICTIONS = "predictions.jsonl"
# files of a checkpoint that are there to resume; the rest is the adapter folder
RESUME_FILES = "optimizer.pt scheduler.pt rng_state* trainer_state.json training_args.bin"
RESUME_FILES += " global_step* latest zero_to_*.py " + PREDICTIONS


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

    def autocast(self):
        """Of training and evaluation: bf16 products, fp32 adapter weights and sums."""
        on = self.cfg.model.compute == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=on)

    def note(self, text: str) -> None:
        if not self.quiet and self.world.first:
            print(text, flush=True)

    def quarantine(self, split: str) -> Path | None:
        name = "quarantine.jsonl" if split == "train" else "quarantine_eval.jsonl"
        return self.output / name if self.world.first else None

    def prepare(self) -> None:
        """The tokenizer, what an adapter of this run will say of its base, and what "auto" means:
        a resumed run keeps its own, which another machine may read otherwise."""
        m = self.cfg.model
        had = read_record(self.resume) if self.resume else {}
        dtype, compute = (
            had.get(k, "auto") if v == "auto" else v
            for k, v in (("dtype", m.dtype), ("compute", m.compute))
        )
        self.settle(dtype=dtype, compute=resolve_compute(compute, self.world.device))
        self.tokenizer = load_tokenizer(m.base)
        found = base_fingerprint(m.base)
        self.record = {
            "method": self.method,
            "base": {"id": base_name(m.base), "fingerprint": found},
            "quantization": m.quantization,
            "compute": self.cfg.model.compute,
            "tokenizer": tokenizer_hash(self.tokenizer),
        }
        if m.adapter is not None:
            folder = find_adapter(m.adapter)
            before = read_record(folder)
            require_base(folder, before, base_name(m.base), found)
            self.record["started_from"] = before.get("fingerprint") or str(folder)

    def settle(self, **values: str) -> None:
        self.cfg = self.cfg.model_copy(update={"model": self.cfg.model.model_copy(update=values)})

    def build_model(self) -> None:
        m, length = self.cfg.model, self.cfg.data.max_length
        start = find_adapter(m.adapter) if m.adapter is not None else None
        with Bar(self.quiet or not self.world.first) as bar:
            bar.doing("loading the base model")
            self.model = build_policy(m, self.cfg.lora, self.cfg.train.seed, start)
        self.record["dtype"] = str(self.model.get_input_embeddings().weight.dtype).split(".")[-1]
        self.settle(dtype=self.record["dtype"])
        if self.cfg.train.gradient_checkpointing:
            # the frozen embedding gives no gradient to recompute along
            self.model.enable_input_require_grads()
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and length > limit:
            raise EagleError(f"data.max_length={length} exceeds the {limit} positions of the base")

    def identify(self, data: dict) -> None:
        """`data`: what the data card says. Fixes what a resumed run must share with this one."""
        self.record["data"] = data
        lora = self.cfg.lora.model_dump(exclude={"dropout"})
        identity = {
            "base": self.record["base"]["fingerprint"],
            **{k: self.record[k] for k in ("quantization", "dtype", "compute")},
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

    def publish(self, state: Any, totals: dict) -> dict:
        """The best adapter and the summary; rank 0 writes. `state`: the trainer's."""
        memory = self.world.max([peak_memory_mb()])[0]
        return self.world.first_does(lambda: self._publish(state, totals, memory))

    def _publish(self, state: Any, totals: dict, memory: float) -> dict:
        kept = disk.checkpoints(self.output)
        name = Path(state.best_model_checkpoint or "").name
        best = next((path for path in kept if path.name == name), kept[-1])
        with atomic_dir(self.output / "adapter") as folder:
            skip = shutil.ignore_patterns(*RESUME_FILES.split())
            shutil.copytree(best, folder, dirs_exist_ok=True, ignore=skip)
        if (best / PREDICTIONS).exists():
            text = (best / PREDICTIONS).read_text(encoding="utf-8")
            atomic_write_text(self.output / PREDICTIONS, text)
        found = {row["step"]: _scores(row) for row in state.log_history if "eval_loss" in row}
        summary = {
            "method": self.method,
            "steps": state.global_step,
            "epochs": state.epoch,
            "seconds": time.monotonic() - self.started,
            **totals,
            "adapter_bytes": adapter_bytes(self.output / "adapter"),
            "peak_memory_mb": memory,
            "heldout_before": next(iter(found.values()), None),
            "heldout_after": found.get(disk.step_of(best), {}),
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
        before, after = summary["heldout_before"] or {}, summary["heldout_after"]
        shown = [f"{n} {before[n]:.4g} -> {after[n]:.4g}" for n in after if n in before]
        self.note(f"held out, before -> after: {', '.join(shown)}")
        self.note(
            f"{summary['steps']} steps in {summary['seconds']:.0f} s; "
            f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters "
            f"trained, adapter {summary['adapter_bytes'] / 2**20:.1f} MiB, peak memory "
            f"{summary['peak_memory_mb']:.0f} MB: {summary['paths']['adapter']}"
        )


def execute(cfg: Any, method: str, body: Callable[[Run], int], quiet: bool = False) -> int:
    """Join the ranks, choose the folder, train; a failure leaves no folder that holds nothing."""
    alone = World(0, 1, resolve_device(None))
    world = join_world() if "RANK" in os.environ or cfg.train.zero is not None else alone

    def claim() -> tuple[Path, Path | None, bool]:
        output = choose_output(cfg.train.output, method, cfg.train.resume)
        fresh = not output.exists()
        resume = disk.find(output, cfg.train.resume) if cfg.train.resume else None
        require_writable(output)
        disk.clear(output)
        return output, resume, fresh

    output, resume, fresh = world.first_does(claim)
    if not world.first:
        logging.getLogger("records").setLevel(logging.ERROR)
    try:
        return body(Run(cfg, method, world, output, quiet, resume))
    except (EagleError, ConfigError):
        if fresh and world.first and not any(output.glob("*.jsonl")):
            shutil.rmtree(output, ignore_errors=True)
        raise


def choose_output(output: str | None, method: str, resume: str | None) -> Path:
    """The run's folder. Without a name `runs/METHOD`, numbered when taken; resuming takes the
    last."""
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and not path.is_dir():
            raise EagleError(f"--output {path} is a file; name a folder")
        if resume is None and holds_run(path):
            raise EagleError(
                f"{path} already holds a run; continue it with --resume, or choose another --output"
            )
        return path
    if resume not in (None, "auto"):
        given = Path(resume)
        return given.parent.parent if disk.NAME.fullmatch(given.name) else given
    base = Path("runs") / method
    names = [base, *(base.with_name(f"{method}-{n}") for n in range(2, 1000))]
    taken = [path for path in names if holds_run(path)]
    free = next(path for path in names if path not in taken)
    return taken[-1] if resume and taken else free


def holds_run(path: Path) -> bool:
    found = any((path / name).exists() for name in ("summary.json", "adapter"))
    return found or bool(disk.checkpoints(path))


def peak_memory_mb() -> float:
    """Most memory in use at once: allocated on the GPU, or the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _scores(row: dict) -> dict:
    """What an evaluation found, without `eval_` and what it cost."""
    cost = ("eval_seconds", "eval_tokens")
    return {k[5:]: v for k, v in row.items() if k.startswith("eval_") and k not in cost}
