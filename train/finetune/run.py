"""What every fine-tuning run has, whatever it learns by: its folder, its ranks, its record and its
report.

    OUTPUT/config.yaml  metrics.jsonl  summary.json  quarantine*.jsonl  predictions.jsonl
    OUTPUT/data/                      the example data, where no file was given
    OUTPUT/checkpoints/checkpoint-N   an adapter folder, and the trainer's optimizer, schedule and
                                      generators
    OUTPUT/adapter/                   the best adapter, see policy.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.finetune_schema import TaskData
from eagle import loading
from eagle.checkpoint import atomic_dir, atomic_write_text, target_fingerprint
from eagle.errors import EagleError
from eagle.meter import Bar
from records import load_tokenizer
from records.dataset import held_out_rows, tell_shared
from records.quarantine import enforce, read_rows, write_quarantine
from records.rows import RowError
from records.sources import resolve
from records.tokens import tokenizer_hash
from train import runs
from train.finetune.assistant import write_example
from train.finetune.policy import base_name, build_policy, read_checkpoint
from train.head.distributed import World, join_world

PREDICTIONS = "predictions.jsonl"
# files of a checkpoint that are there to resume; the rest is the adapter folder
RESUME = ("*.pt", "*.pth", "trainer_state.json", "global_step*", "latest", "zero_to_*", PREDICTIONS)
PATHS = ("adapter", "metrics.jsonl", "checkpoints")
# without DeepSpeed, which has folders of its own
NEEDED = {"optimizer.pt", "scheduler.pt", "trainer_state.json", loading.WEIGHTS, loading.RECORD}
LEARNING = {"train", "dpo", "balance"}  # sections that may change when a run is resumed


@dataclass
class Run:
    """One run on this rank. `cfg` is one of the configs of `finetune_schema`."""

    cfg: Any
    method: str
    world: World
    output: Path
    quiet: bool = False
    resume: Path | None = None
    model: Any = None
    tasks: list[dict] | None = None
    predictions: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """The tokenizer, what an adapter of this run will say of its base, and what "auto" means:
        a resumed run keeps its own, which another machine may read otherwise."""
        m, had = self.cfg.model, loading.read_record(self.resume) if self.resume else {}
        names = [k for k in ("dtype", "compute") if getattr(m, k) == "auto"]
        kept = {k: had.get(k, "auto") for k in names}
        compute = loading.resolve_compute(kept.get("compute", m.compute), self.world.device)
        self.settle(**{**kept, "compute": compute})
        self.tokenizer = load_tokenizer(m.base)
        checkpoint = read_checkpoint(m.base)
        self.vocab_size = checkpoint.get_input_embeddings().num_embeddings
        found = target_fingerprint(checkpoint)
        self.record = {
            "method": self.method,
            "base": {"id": base_name(m.base), "fingerprint": found},
            "quantization": m.quantization,
            "compute": compute,
            "tokenizer": tokenizer_hash(self.tokenizer),
        }
        if m.adapter is not None:
            folder = loading.find_adapter(m.adapter)
            before = loading.read_record(folder)
            loading.require_base(folder, before, base_name(m.base), found)
            self.record["started_from"] = before.get("fingerprint") or str(folder)

    def settle(self, **values: str) -> None:
        self.cfg = self.cfg.model_copy(update={"model": self.cfg.model.model_copy(update=values)})

    def autocast(self):
        """Of training and evaluation: bf16 products, fp32 adapter weights and sums."""
        on = self.cfg.model.compute == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=on)

    def note(self, text: str) -> None:
        if not self.quiet and self.world.first:
            print(text, flush=True)

    def load(self, data: dict, attach: Callable[[Run], None] | None) -> None:
        """The model, to which `attach` may add, and what a resumed run must share with this one.
        `data`: what the data card says."""
        with Bar(self.quiet or not self.world.first) as bar:
            bar.doing("loading the base model")
            self.model = build_policy(self.cfg.model, self.cfg.lora, self.cfg.train.seed)
        self.record["dtype"] = str(self.model.get_input_embeddings().weight.dtype).split(".")[-1]
        self.settle(dtype=self.record["dtype"])
        if self.cfg.train.gradient_checkpointing:
            # the frozen embedding gives no gradient to recompute along
            self.model.enable_input_require_grads()
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and (length := self.cfg.data.max_length) > limit:
            raise EagleError(f"data.max_length={length} exceeds the {limit} positions of the base")
        if attach is not None:
            attach(self)
        # before TRL adds the reference's adapter; a packed 4-bit weight counts what it stands for
        trainable, total = self.model.get_nb_trainable_parameters()
        self.record |= {"data": data, "trainable_parameters": trainable, "total_parameters": total}
        t, balance = self.cfg.train, getattr(self.cfg, "balance", None)
        identity = {
            "base": self.record["base"]["fingerprint"],
            **{k: self.record[k] for k in ("quantization", "dtype", "compute")},
            "adapter": self.record.get("started_from")
            or self.cfg.lora.model_dump(exclude={"dropout"}),
            **{f"data.{k}": v for k, v in data.items() if isinstance(v, (int, str))},
            "data.seed": self.cfg.data.seed,
            "train.seed": t.seed,
            # the place in the data is known by steps
            "rows of a step": t.batch_size * t.grad_accum * self.world.size,
            "train.zero": t.zero,  # whose checkpoints are cut for the ranks, and keep the settings
            "ranks, rate, decay and betas under ZeRO": t.zero is not None
            and [self.world.size, t.lr, t.weight_decay, t.betas],
            "tasks": self.tasks,
            "balance": balance and balance.model_dump(exclude={"max_generations"}),
        }
        self.record["identity"] = identity = json.loads(json.dumps(identity))
        self.record["settings"] = now = self.cfg.model_dump(mode="json", include=LEARNING)
        if self.resume is not None:
            before = loading.read_record(self.resume)
            runs.require_same_run(self.resume, before.get("identity", {}), identity)
            for note in (f"continues {self.resume}", *runs.changes(before["settings"], now)):
                self.note(note)
        if self.world.first:
            runs.write_config(self.output, self.cfg)

    def publish(self, state: Any, peak: float) -> None:
        """The best adapter and the summary. state: the trainer's; peak: MB of memory."""
        kept = {runs.step_of(path): path for path in runs.checkpoints(self.output)}
        best = kept.get(state.best_global_step, kept[max(kept)])
        with atomic_dir(self.output / "adapter") as folder:
            skip = shutil.ignore_patterns(*RESUME)
            shutil.copytree(best, folder, dirs_exist_ok=True, ignore=skip)
        if (made := best / PREDICTIONS).exists():
            atomic_write_text(self.output / PREDICTIONS, made.read_text(encoding="utf-8"))
        found = {}
        for row in (row for row in state.log_history if "eval_loss" in row):
            scores = {k[5:]: v for k, v in row.items() if k.startswith("eval_")}
            found[row["step"]] = {k: v for k, v in scores.items() if k not in ("seconds", "tokens")}
        before, after = next(iter(found.values()), {}), found.get(runs.step_of(best), {})
        trainable, total = (self.record[f"{n}_parameters"] for n in ("trainable", "total"))
        summary = {
            "method": self.method,
            "steps": state.global_step,
            "epochs": state.epoch,
            "seconds": time.monotonic() - self.started,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "trainable_share": trainable / total,
            "adapter_bytes": sum(f.stat().st_size for f in best.glob("*.safetensors")),
            "peak_memory_mb": peak,
            "heldout_before": before or None,
            "heldout_after": after,
            "best": {"checkpoint": best.name, "eval_loss": state.best_metric},
            "data": self.record["data"],
            "paths": {n.split(".")[0]: str(self.output / n) for n in PATHS},
        }
        atomic_write_text(self.output / "summary.json", json.dumps(summary, indent=2) + "\n")
        shown = [f"{n} {before[n]:.4g} -> {after[n]:.4g}" for n in after if n in before]
        self.note(
            f"held out, before -> after: {', '.join(shown)}\n{state.global_step} steps in "
            f"{summary['seconds']:.0f} s, peak memory {peak:.0f} MB: {summary['paths']['adapter']}"
        )


def execute(cfg: Any, method: str, body: Callable[[Run], int], quiet: bool = False) -> int:
    """Join the ranks, choose the folder, train; a failure leaves no folder that holds nothing."""
    alone = World(0, 1, loading.resolve_device(None))
    world = join_world() if "RANK" in os.environ or cfg.train.zero is not None else alone
    if not world.first:
        logging.getLogger("records").setLevel(logging.ERROR)
    with runs.claimed(world, cfg.train.output, method, cfg.train.resume) as output:
        given = cfg.train.resume
        resume = given and world.first_does(
            lambda: runs.find_checkpoint(output, given, require_whole)[0]
        )
        return body(Run(cfg, method, world, output, quiet, resume))


def require_whole(checkpoint: Path) -> None:
    """Raises EagleError when a file is missing or damaged, which torch's files know by checksums."""
    files = {path.name: path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    missing = set() if [*checkpoint.glob("global_step*")] else NEEDED - files.keys()
    if missing:
        raise runs.unreadable(checkpoint, f"{', '.join(sorted(missing))} is missing")
    for path in files.values():
        try:
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as parts:
                    if wrong := parts.testzip():
                        raise ValueError(f"wrong checksum of {wrong}")
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            raise runs.unreadable(checkpoint, f"{path.name}: {error}") from error


def load_rows(run: Run, kind: str, render: Callable[[dict], list]) -> tuple[list, list, dict]:
    """Rows for training, rows held out, and the data card, of pairs or of tasks; without files, of
    the example `kind`. `render`: a record's rows, each with its `key`, and with the names of fields
    that it did not use. Records that it refuses (RowError) are written down, and above
    data.max_bad_fraction end the run."""
    cfg: TaskData = run.cfg.data

    def checked(record: dict) -> list:
        found = render(record)
        ids = (i for row in found for sequence in row.sequences for i in sequence)
        if (largest := max(ids, default=0)) >= run.vocab_size:
            detail = f"{largest}, vocabulary {run.vocab_size}"
            raise RowError("token id outside the vocabulary", "use the base's tokenizer", detail)
        return found

    def read(given: list[str] | None, split: str, most: int | None) -> tuple[list[Any], dict]:
        files = resolve(given) if given else [write_example(kind, split, run.output / "data")[0]]
        rows, bad, records = read_rows(files, checked, cfg, kind, most)
        out = run.output / f"quarantine{'' if split == 'train' else '_eval'}.jsonl"
        if bad and run.world.first:
            write_quarantine(bad, out)
        enforce(bad, records, cfg.max_bad_fraction, out if bad else None)
        card = {"files": [path.name for path in files], "records": records, "bad": len(bad)}
        return rows, {**card, "bad_by_reason": dict(Counter(row.reason for row in bad))}

    rows, card = read(cfg.paths, "train", cfg.max_rows)
    if cfg.eval_paths or not cfg.paths:
        heldout, _ = read(cfg.eval_paths, "eval", cfg.max_eval_rows)
    else:  # all rows of a record are on one side
        held = held_out_rows(np.array([row.key for row in rows]), cfg.heldout_fraction)
        heldout = [row for row, out in zip(rows, held, strict=True) if out]
        rows = [row for row, out in zip(rows, held, strict=True) if not out]
    if not rows or not heldout:
        said = f"{len(rows)} rows are left to train on and {len(heldout)} held out"
        raise EagleError(f"{said}: add data, or change data.heldout_fraction")
    parts = (rows, heldout)
    tell_shared(*([hash(repr(r).replace(str(r.key), "")) for r in part] for part in parts))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    card |= {"rows": len(rows), "heldout_rows": len(heldout), "digest": digest.hexdigest()[:16]}
    return rows, heldout, card
