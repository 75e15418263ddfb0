"""Memory and disk: what there is, and what a run will need. Knows sizes; loads no weights.

S unrolled steps, H hidden of the head, I its MLP's width, F features (3 x hidden of the target), W
weights of the head.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import HeadTrainConfig
from eagle.heads.head import HeadConfig
from eagle.loading import cache_folder
from train.checks.findings import Finding, note, ok, problem, size, warning
from train.head.teacher import LOGITS

LITTLE, NOTHING = 5 * 2**30, 2**30  # bytes of free disk


def free(folder: Path) -> int:
    """Free bytes of the file system that holds `folder`, or its nearest parent that exists."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def folders(cfg: HeadTrainConfig) -> dict[str, Path]:
    return {
        "cache (data.cache_dir, $EAGLE_CACHE)": Path(cfg.data.cache_dir or cache_folder()),
        "output (train.output)": Path(cfg.train.output or "runs"),
    }


def disk(cfg: HeadTrainConfig) -> Iterator[Finding]:
    for name, folder in folders(cfg).items():
        parent, left = existing(folder), free(folder)
        text = f"{name}: {size(left)} free for {folder}"
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            yield problem(
                "disk", f"{name}: {folder} cannot be written", "set it to a folder of yours"
            )
        elif left < NOTHING:
            yield problem("disk", text, "free some space, or set it to another disk")
        elif left < LITTLE:
            yield warning(
                "disk",
                text,
                "enough for small targets only: free some space, or set it to another disk",
            )
        else:
            yield ok("disk", text)


def available_memory(device: torch.device) -> int:
    """Free bytes: of the GPU, or of this process's memory limit (container included)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    left = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            values = [(Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit, used)]
        except OSError:
            continue
        if values[0].isdigit():
            left = min(left, max(int(values[0]) - int(values[1]), 0))
    return left


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a training process, an estimate. N: padded tokens of a micro-batch, all of them
    supervised.

    target       its weights as they are loaded
    head         W · (4 weights + 4 gradients), fp32
    optimizer    W · 8 for AdamW's two moments, W · 4 for Muon's one; divided by the processes under
      ZeRO
    activations  kept for the backward pass: S·N·(57·H + 4·s·I) with s bytes a number, S·N·16·H when
                 they are recomputed (counted with torch.autograd.graph.saved_tensors_hooks)
    passing      the target's pass, N·s·(F + 8·H + 2·I) with the target's H and I, and three tiles
    of
                 logits in fp32

    Shorter rows and fewer supervised tokens need less; the evaluations' caches, the allocator's
    slack and the libraries themselves (about 1 GiB) come on top.
    """

    target: int
    head: int
    optimizer: int
    activations: int
    passing: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @classmethod
    def of(
        cls,
        cfg: HeadTrainConfig,
        head: HeadConfig,
        weights: int,
        target_bytes: int,
        target_width: int,
        world: int = 1,
        logits: int = LOGITS,
    ) -> MemoryNeed:
        """weights: W. target_width: I of the target."""
        t = cfg.train
        N = t.max_tokens_per_batch or t.batch_size * cfg.data.max_length
        H, s = head.hidden_size, 2 if t.dtype == "bf16" else 4
        kept = 16 * H if t.checkpoint_activations else 57 * H + 4 * s * head.intermediate_size
        moments = (4 if t.optimizer == "muon" else 8) * weights // (world if t.zero else 1)
        passing = N * s * (11 * head.target_hidden_size + 2 * target_width) + 3 * 4 * logits
        return cls(target_bytes, 8 * weights, moments, t.ttt_steps * N * kept, passing)


def memory(need: MemoryNeed, device: torch.device) -> Iterator[Finding]:
    left = available_memory(device)
    parts = ", ".join(f"{name} {size(value)}" for name, value in vars(need).items())
    text = f"memory of training, estimated: {size(need.total)} ({parts}); {size(left)} free on {device.type}"
    if need.total > left:
        yield problem(
            "memory",
            text,
            "lower train.batch_size or data.max_length, set train.checkpoint_activations=true, spread "
            "with train.zero=2 over more GPUs, or use a smaller target",
        )
    elif need.total > 0.8 * left:
        yield warning("memory", text, "leave some room: lower train.batch_size or data.max_length")
    else:
        yield ok("memory", text)


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on disk, an estimate.

    checkpoint   W · (4 weights + 8 moments) + W · 2 for the head in bf16 (4 in fp32)
    checkpoints  `save_total_limit` + 2: the best one, and the one being written
    tokens       the tokenised cache: 4 bytes an id, 1 a mask entry
    features     offline features, `tokens · (F + H_target) · 2`: only if they are prepared
    """

    checkpoint: int
    checkpoints: int
    tokens: int
    features: int

    @classmethod
    def of(cls, cfg: HeadTrainConfig, weights: int, tokens: int, target_hidden: int) -> DiskNeed:
        moments = 4 if cfg.train.optimizer == "muon" else 8
        one = weights * (4 + moments + (2 if cfg.train.dtype == "bf16" else 4))
        return cls(
            one, one * (cfg.train.save_total_limit + 2), 5 * tokens, tokens * 4 * target_hidden * 2
        )


def disk_need(need: DiskNeed, cfg: HeadTrainConfig) -> Iterator[Finding]:
    cache, output = folders(cfg).values()
    text = (
        f"a checkpoint takes {size(need.checkpoint)}, those that are kept {size(need.checkpoints)}"
    )
    if need.checkpoints > free(output):
        yield problem(
            "disk",
            f"{text}; {size(free(output))} are free for {output}",
            "free some space, choose another --output, or lower train.save_total_limit",
        )
    else:
        yield ok("disk", text)
    if not need.tokens:
        return
    if need.tokens > free(cache):
        yield problem(
            "disk",
            f"tokenised data takes about {size(need.tokens)}; {size(free(cache))} are free for "
            f"{cache}",
            "set data.cache_dir to a disk with space",
        )
    text = f"offline features would take about {size(need.features)}"
    if need.features > free(output):
        yield note(
            "disk",
            f"{text}, more than is free for {output}",
            "train online (the default), or prepare features on another disk",
        )
    else:
        yield ok("disk", text)
