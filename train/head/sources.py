"""Metrics of a mixture's sources, summed over the steps between two rows of the log.

G sources, S unrolled steps, C columns of `train.head.metrics`.
"""

from __future__ import annotations

import torch

from train.head.metrics import COLUMNS, depth_metrics

SHOWN = ("loss", "accuracy_by_depth", "acceptance_by_depth", "tau_simulated", "targets")


def by_source(sums: torch.Tensor, source: torch.Tensor, count: int) -> torch.Tensor:
    """sums [B, S, C] of rows and their source [B] -> [count, S, C] fp64 on the CPU."""
    out = torch.zeros(count, *sums.shape[1:], dtype=torch.float64)
    return out.index_add_(0, source.cpu(), sums.detach().double().cpu())


class SourceMetrics:
    """names [G], weights [G]: how much a source's losses count; only their ratios matter."""

    def __init__(self, names: list[str], weights: list[float], depth_weights: list[float]) -> None:
        self.names, self.depth_weights = names, depth_weights
        self.weights = torch.tensor(weights, dtype=torch.float64) / min(weights)
        self.sums = torch.zeros(len(names), len(depth_weights), len(COLUMNS), dtype=torch.float64)

    def step(self, sums: torch.Tensor) -> dict:
        """A step's sums [G, S, C] -> its metrics; `loss` is what was minimised, so loss weights
        count in it, and in nothing else."""
        self.sums += sums
        metrics = depth_metrics(sums.sum(0), self.depth_weights)
        if len(set(self.weights.tolist())) > 1:
            weighted = depth_metrics(
                (sums * self.weights[:, None, None]).sum(0), self.depth_weights
            )
            metrics |= {name: weighted[name] for name in ("loss", "loss_by_depth")}
        return metrics

    def take(self) -> dict[str, dict]:
        """Metrics by name since the last call; {} for a single source. Sources that had no row are
        left out.
        """
        found = {}
        for name, sums in zip(self.names, self.sums, strict=True):
            if len(self.names) > 1 and sums.any():
                metrics = depth_metrics(sums, self.depth_weights)
                found[name] = {key: metrics[key] for key in SHOWN}
        self.sums.zero_()
        return found
