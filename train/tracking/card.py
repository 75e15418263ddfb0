"""What a run was made of, written when it starts: OUTPUT/run.json. Names no host and no user."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from eagle.costs import device_name
from train.doctor_machine import version

PACKAGES = """eagle-heads torch transformers deepspeed datasets safetensors triton peft bitsandbytes
flash-attn flash-attn-4""".split()
QUANTILES = {"min": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1}


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions (None: not installed), device, cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "device": device_name(device),
        "device_type": device.type,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean and quantiles; {} of nothing."""
    if len(values) == 0:
        return {}
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return {**dict(zip(QUANTILES, found, strict=True)), "mean": float(values.mean())}


def run_card(parts) -> dict[str, Any]:
    """What a run's `train.head.setup.Parts` are."""
    masks = {}
    for source in parts.data.sources:
        lengths = np.array([source.length(n) for n in range(len(source))], dtype=np.int64)
        mask = source.column("loss_mask")
        total = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        supervised = np.diff(total[[0, *np.cumsum(lengths)]])  # [rows]
        masks[source.name] = {
            "rows": len(lengths),
            "tokens": int(lengths.sum()),
            "supervised_tokens": int(supervised.sum()),
            "supervised_share": float(supervised.sum() / max(lengths.sum(), 1)),
            "row_length": spread(lengths),
            "supervised_per_row": spread(supervised),
            "supervised_share_of_row": spread(supervised / np.maximum(lengths, 1)),
        }
    kept = ("target", "tokenizer", "data", "draft_vocabulary")
    weights = sum(p.numel() for p in parts.head.parameters())
    card = {name: parts.provenance[name] for name in kept}
    return {**card, "head": {"parameters": weights}, "masks": masks}
