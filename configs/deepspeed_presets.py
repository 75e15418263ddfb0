"""The DeepSpeed preset, filled in from a run's config; the loop steps its own schedule."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from configs.schema import HeadTrainConfig


def zero_preset(stage: int) -> dict[str, Any]:
    """The preset of a ZeRO stage, with "auto" where a run's values belong."""
    preset = json.loads((files("configs") / "deepspeed" / "zero.json").read_text(encoding="utf-8"))
    preset["zero_optimization"]["stage"] = stage
    return preset


def deepspeed_config(cfg: HeadTrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Config for `deepspeed.initialize`: the preset of `cfg.train.zero` with values set."""
    assert world_size >= 1, world_size
    train = cfg.train
    filled = zero_preset(train.zero)
    filled["train_micro_batch_size_per_gpu"] = train.batch_size
    filled["gradient_accumulation_steps"] = train.grad_accum
    filled["train_batch_size"] = train.batch_size * train.grad_accum * world_size
    filled["gradient_clipping"] = train.grad_clip
    filled["optimizer"]["params"].update(
        lr=train.lr, betas=list(train.betas), weight_decay=train.weight_decay
    )
    return filled
