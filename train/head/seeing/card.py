"""What a run was made of, written when it starts: OUTPUT/run.json. Names no host and no user."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import numpy as np
import torch

from eagle.costs import device_name

PACKAGES = (
    "eagle-heads",
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "safetensors",
    "triton",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "flash-attn-4",
)
BINS = 20


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions (None: not installed), device, cores."""
    cores = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return {
        "device": device_name(device),
        "device_type": device.type,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "usable_cores": len(cores),
        "system": platform.system(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def mask_statistics(lengths: np.ndarray, supervised: np.ndarray) -> dict[str, Any]:
    """lengths, supervised [rows]: tokens of each row and how many are targets -> totals and
    histograms.
    """
    share = supervised / np.maximum(lengths, 1)
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / max(lengths.sum(), 1)),
        "row_length": spread(lengths),
        "supervised_per_row": spread(supervised),
        "supervised_share_of_row": spread(share),
    }


def spread(values: np.ndarray) -> dict[str, Any]:
    """Quantiles and a histogram: counts[i] values lie between edges[i] and edges[i + 1]."""
    if len(values) == 0:
        return {}
    counts, edges = np.histogram(values, bins=BINS)
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return {
        "min": float(values.min()),
        "p5": float(low),
        "median": float(middle),
        "p95": float(high),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "counts": counts.tolist(),
        "edges": [float(edge) for edge in edges],
    }


def source_lengths(source) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets of each row of a `records.dataset.Source`, without reading ids into
    Python.
    """
    table = source.entry.table.select(source.indices).with_format("arrow")
    lengths, supervised = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for batch in table.iter(batch_size=1000):
        masks = batch["loss_mask"].combine_chunks()
        ends = masks.offsets.to_numpy()
        total = np.concatenate([[0], np.cumsum(masks.values.to_numpy(), dtype=np.int64)])
        lengths.append(np.diff(ends))
        supervised.append(np.diff(total[ends]))
    return np.concatenate(lengths), np.concatenate(supervised)


def masks_by_source(data) -> dict[str, dict[str, Any]]:
    """`mask_statistics` of each source of a `TokenizedData`, by its name."""
    return {source.name: mask_statistics(*source_lengths(source)) for source in data.sources}


def run_card(parts) -> dict[str, Any]:
    """What a run's `train.head.setup.Parts` are."""
    kept = ("target", "tokenizer", "data", "draft_vocabulary")
    card = {name: parts.provenance[name] for name in kept}
    weights = sum(p.numel() for p in parts.head.parameters())
    return {**card, "head": {"parameters": weights}, "masks": masks_by_source(parts.data)}
