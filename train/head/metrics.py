"""From what a step sums to the numbers that are shown and logged, of all rows and by source.

S unrolled steps; a depth of the metrics is a step. G sources, C columns."""

from __future__ import annotations

import torch

from eagle.meter import Bar, clock

# what a training step sums for each depth, over positions
COLUMNS = ("loss", "targets", "known", "right", "overlap", "asked", "held")
OF_SOURCES = ("loss", "accuracy_by_depth", "acceptance_by_depth", "tau_simulated", "targets")


def depth_metrics(sums: torch.Tensor, depth_weights: list[float]) -> dict:
    """sums [S, C] of the global batch, depth_weights [S] -> metrics.

    accuracy_by_depth: the head's best token is the target's, whatever came before (wrong outside
    the draft vocabulary). acceptance_by_depth: the same, given that all earlier depths of the chain
    were right. overlap_by_depth: mean Σ min(p, q) where the target's token is in the draft
    vocabulary. tau_simulated: 1 + Σ of the products of acceptance_by_depth."""
    column = {name: sums[:, i].double() for i, name in enumerate(COLUMNS)}

    def share(a: str, b: str) -> list[float]:
        return (column[a] / column[b].clamp_min(1)).tolist()

    loss = column["loss"] / column["targets"].clamp_min(1)
    weights = torch.tensor(depth_weights, dtype=torch.float64)
    acceptance = share("held", "asked")
    return {
        "loss": float((loss * weights).sum()),
        "loss_by_depth": loss.tolist(),
        "accuracy_by_depth": share("right", "targets"),
        "acceptance_by_depth": acceptance,
        "overlap_by_depth": share("overlap", "known"),
        "tau_simulated": 1 + float(torch.tensor(acceptance, dtype=torch.float64).cumprod(0).sum()),
        "targets": int(column["targets"][0]),
        "outside_draft_vocab": int(column["targets"][0] - column["known"][0]),
    }


def by_source(sums: torch.Tensor, source: torch.Tensor, count: int) -> torch.Tensor:
    """sums [B, S, C] of rows and their source [B] -> [count, S, C] fp64 on the CPU."""
    out = torch.zeros(count, *sums.shape[1:], dtype=torch.float64)
    return out.index_add_(0, source.cpu(), sums.detach().double().cpu())


class SourceMetrics:
    """Metrics of a mixture's sources, summed over the steps between two rows of the log. Each has a
    name and a loss weight; only the ratios of these matter."""

    def __init__(self, sources: list, depth_weights: list[float]) -> None:
        self.names, self.depth_weights = [source.name for source in sources], depth_weights
        weights = torch.tensor([source.loss_weight for source in sources], dtype=torch.float64)
        self.weights = weights / weights.min()
        self.sums = torch.zeros(len(sources), len(depth_weights), len(COLUMNS), dtype=torch.float64)

    def step(self, sums: torch.Tensor) -> dict:
        """A step's sums [G, S, C] -> its metrics; `loss` is what was minimised, so loss weights
        count in it, and in nothing else."""
        self.sums += sums
        metrics = depth_metrics(sums.sum(0), self.depth_weights)
        if len(set(self.weights.tolist())) > 1:
            weighted = (sums * self.weights[:, None, None]).sum(0)
            weighted = depth_metrics(weighted, self.depth_weights)
            metrics |= {name: weighted[name] for name in ("loss", "loss_by_depth")}
        return metrics

    def take(self) -> dict[str, dict]:
        """Metrics by name since the last call, of sources that had a row; {} for a single one."""
        found = {}
        for name, sums in zip(self.names, self.sums, strict=True):
            if len(self.names) > 1 and sums.any():
                metrics = depth_metrics(sums, self.depth_weights)
                found[name] = {key: metrics[key] for key in OF_SOURCES}
        self.sums.zero_()
        return found


class Progress(Bar):
    """How far the training is, with a step's metrics."""

    def __init__(self, total: int | None, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.total, self.first = total, True

    def update(self, step: int, fraction: float, eta: float, row: dict, memory: int | None = None):
        """eta: seconds. memory: bytes in use. acceptance is shown by depth, conditional."""
        text = (
            f"loss {row['loss']:.3f}  "
            f"acceptance {' '.join(f'{a:.2f}' for a in row['acceptance_by_depth'])}  "
            f"tau~{row['tau_simulated']:.2f}  {row['tokens_per_second']:.0f} tok/s  "
            f"{row['steps_per_second']:.2f} steps/s  ETA {clock(eta)}"
        )
        text += f"  {memory / 2**30:.1f} GiB" if memory else ""
        count = f"step {step}/{self.total}" if self.total else f"step {step}"
        self.show(count, fraction, text, now=self.first or fraction >= 1)
        self.first = False
