"""Writing features: plan all shards, estimate the disk, then one whole shard after the other. The
format is train/head/features.py's.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text, load_head, require_equal
from eagle.errors import EagleError
from eagle.heads.head import FINAL
from eagle.loading import resolve_device
from eagle.meter import Meter
from eagle.target import Target
from records import Collator, load_dataset_for, load_tokenizer
from train.head.features import INDEX, Belongs, Index, damage, data_settings, row_key
from train.head.teacher import hidden_and_features
from train.runs import LOCK

SPARE = 64 << 20  # bytes that stay free


def write_features(
    cfg: HeadTrainConfig,
    output: Path,
    command: str,
    shard_mb: float = 256,
    batch_size: int = 8,
    quiet: bool = False,
) -> Index:
    """Features of every training row of `cfg`, in `output`; shards that are there already are kept.

    command: what to tell a user to run when a shard must be written again, without --output.
    """
    data = load_dataset_for(cfg.data, load_tokenizer(cfg.model.base), split="train")
    target = open_target(cfg)
    data.require_ids_below(target.vocab_size)
    index = Index(Belongs.to(target), data_settings(cfg.data, data), command)
    rows = plan_shards(index, data, round(shard_mb * 2**20))
    longest = max(map(len, rows))
    if longest > target.max_positions:
        text = f"a row has {longest} tokens and {target.name} {target.max_positions} positions"
        raise EagleError(f"{text}; lower data.max_length")
    todo = find_todo(output, index)
    require_room(output, index, todo, quiet)
    done = len(rows) - sum(index.shards[n]["rows"] for n in todo)
    start = np.cumsum([0, *(shard["rows"] for shard in index.shards)])
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / INDEX).exists():
            atomic_write_text(output / INDEX, index.to_json())
        with Meter("features", len(rows), done=done, quiet=quiet) as meter:
            for number in todo:
                part = rows[start[number] : start[number + 1]]
                tensors = compute(target, part, batch_size, meter)
                write_shard(output / index.shards[number]["file"], tensors, index.id)
    except (OSError, SafetensorError) as error:
        text = f"cannot write features to {output}: {getattr(error, 'strerror', None) or error}"
        remedy = "make room and run the same command again, or choose another --output"
        raise EagleError(f"{text}; what is there stays whole: {remedy}") from error
    return index


def open_target(cfg: HeadTrainConfig) -> Target:
    """The run's target, with the feature layers of its head."""
    m = cfg.model
    served = {"adapter_path": m.adapter, "quantization": m.quantization}
    target = Target.from_pretrained(m.base, dtype=m.dtype, device=resolve_device(None), **served)
    head = load_head(m.init_head, target)[0].config if m.init_head else m
    layers = head.feature_layers
    if m.method == "eagle1" or layers == (FINAL,):
        raise EagleError(
            "EAGLE-1 heads are trained with the target at hand: its last hidden state is all that "
            "they read; leave this step out"
        )
    if layers is not None:
        target.set_feature_layers(layers)
    return target


def plan_shards(index: Index, data, shard_bytes: int) -> list[np.ndarray]:
    """Fill `index.shards` and `index.rows`; returns the distinct rows in the order of their
    places."""
    size = max(shard_bytes // index.belongs.bytes_per_token, 1)  # tokens
    kept: list[np.ndarray] = []
    for ids in (ids for source in data.sources for ids in source.token_rows()):
        key = row_key(ids)
        if key in index.rows:
            continue
        if not index.shards or index.shards[-1]["tokens"] + len(ids) > size:
            name = f"shard-{len(index.shards):05d}.safetensors"
            index.shards.append({"file": name, "rows": 0, "tokens": 0})
        shard = index.shards[-1]
        index.rows[key] = (len(index.shards) - 1, shard["tokens"], len(ids))
        shard["rows"] += 1
        shard["tokens"] += len(ids)
        kept.append(ids)
    return kept


def find_todo(output: Path, index: Index) -> list[int]:
    """Shards that are missing or damaged. Refuses a folder that holds anything else."""
    if (output / INDEX).exists():
        found = Index.read(output)
        if found.id != index.id:
            ours, theirs = asdict(index.belongs), asdict(found.belongs)
            what = ", ".join(k for k in ours if ours[k] != theirs[k]) or "data or --shard_mb"
            text = f"{output} holds other features (another {what})"
            raise EagleError(f"{text}; choose another --output, or delete it")
    elif output.exists() and (not output.is_dir() or {p.name for p in output.iterdir()} - {LOCK}):
        text = f"--output {output} is not empty and holds no features"
        raise EagleError(f"{text}; choose another folder")
    for stale in output.glob(".shard-*.tmp"):  # of a run that was killed
        stale.unlink()
    paths = [output / shard["file"] for shard in index.shards]
    return [n for n, path in enumerate(paths) if damage(path, index, n)]


def require_room(output: Path, index: Index, todo: list[int], quiet: bool) -> None:
    """Say how much disk this takes, and refuse when there is not as much."""
    shards, each = index.shards, index.belongs.bytes_per_token
    there = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(there).free, sum(shards[n]["tokens"] for n in todo) * each
    if not quiet:
        print(
            f"features: {len(index.rows)} rows, {index.tokens} tokens x {each} bytes = "
            f"{index.tokens * each / 1e9:.3g} GB in {len(shards)} shards; "
            f"{len(shards) - len(todo)} are there; {free / 1e9:.3g} GB free at {there}",
            file=sys.stderr,
        )
    replaced = sum(p.stat().st_size for n in todo if (p := output / shards[n]["file"]).exists())
    if needed + SPARE > free + replaced:
        raise EagleError(
            f"features need {needed / 1e9:.3g} GB and {there} has {free / 1e9:.3g} GB free: choose an "
            "--output on a larger disk, take fewer rows, or train without --features"
        )


def compute(
    target: Target, rows: list[np.ndarray], batch_size: int, meter: Meter
) -> dict[str, torch.Tensor]:
    """rows -> features [tokens, F] and hidden [tokens, H], rows end to end, by the pass that
    training makes."""
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    order = sorted(range(len(rows)), key=lambda n: (len(rows[n]), n))  # little padding
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = Collator()(
            [{"input_ids": rows[n].tolist(), "loss_mask": [0] * len(rows[n])} for n in chosen]
        )
        ids, mask = (batch[name].to(target.device) for name in ("input_ids", "attention_mask"))
        hidden, features = hidden_and_features(target, ids, mask)
        lengths = [len(rows[n]) for n in chosen]
        parts = (x.to("cpu", target.dtype).split(lengths) for x in (features, hidden))
        found |= zip(chosen, zip(*parts, strict=True), strict=True)
        meter.add(len(chosen), sum(lengths))
    features, hidden = zip(*(found[n] for n in range(len(rows))), strict=True)
    return {"features": torch.cat(features), "hidden": torch.cat(hidden)}


def write_shard(path: Path, tensors: dict[str, torch.Tensor], index_id: str) -> None:
    """Whole or not at all, and read back before it counts."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"index": index_id})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        require_equal(load_file(temporary), tensors, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
