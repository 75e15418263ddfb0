"""How far a run is, and the learning rate there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warmup, then cosine, over the true length of the run.

    total: optimizer steps, None when only the clock ends the run. budget: seconds, None when only
    steps do.
    """

    cfg: TrainConfig
    total: int | None
    budget: float | None

    @classmethod
    def of(cls, cfg: TrainConfig, rows: int, global_batch: int) -> Schedule:
        total = cfg.max_steps
        if total is None and cfg.time_budget_minutes is None:
            total = max(1, math.ceil(rows * cfg.epochs / global_batch))
        budget = cfg.time_budget_minutes * 60 if cfg.time_budget_minutes else None
        return cls(cfg, total, budget)

    def fraction(self, steps: int, elapsed: float) -> float:
        """0 … 1: `steps` done after `elapsed` seconds; whatever ends the run first counts."""
        by_steps = steps / self.total if self.total else 0.0
        by_time = elapsed / self.budget if self.budget else 0.0
        return max(by_steps, by_time)

    def lr(self, fraction: float) -> float:
        peak, low, warm = self.cfg.lr, self.cfg.lr * self.cfg.min_lr_ratio, self.cfg.warmup_ratio
        fraction = min(max(fraction, 0.0), 1.0)
        if fraction < warm:
            return peak * fraction / warm
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (fraction - warm) / (1 - warm)))
