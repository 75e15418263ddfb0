"""From sums to the numbers that are logged, and where they are written.

S unrolled steps; a depth of the metrics is a step.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from eagle.checkpoint import atomic_write_text
from eagle.meter import Bar, clock

# what a training step sums for each depth, over positions
COLUMNS = ("loss", "targets", "known", "right", "overlap", "asked", "held")


def depth_metrics(sums: torch.Tensor, depth_weights: list[float]) -> dict:
    """sums [S, len(COLUMNS)] of the global batch, depth_weights [S] -> metrics.

    accuracy_by_depth: the head's best token is the target's, whatever came before (targets outside
    the draft vocabulary count as wrong). acceptance_by_depth: the same, given that all earlier
    depths of the same chain were right. overlap_by_depth: mean Σ min(p, q) where the target's token
    is in the draft vocabulary. tau_simulated: 1 + Σ of the products of acceptance_by_depth, a
    chain's acceptance length.
    """
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


def rounded(value):
    """Six significant digits: enough to plot, short enough to read. The loss itself is never
    rounded.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


class MetricsLog:
    """`metrics.jsonl`: a row a line, each flushed. On resume, rows after the resumed step are
    dropped.
    """

    def __init__(self, path: Path, keep_to: int) -> None:
        self.path = path
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in rows if _step_of(line) <= keep_to]
        atomic_write_text(path, "".join(line + "\n" for line in kept))

    def write(self, row: dict) -> None:
        line = {k: v if k == "loss" else rounded(v) for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a kill


class Progress(Bar):
    """How far the training is, with a step's metrics."""

    def __init__(self, total: int | None, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.total, self.first = total, True

    def update(
        self, step: int, fraction: float, eta: float, row: dict, memory: int | None = None
    ) -> None:
        """eta: seconds. memory: bytes in use."""
        count = f"step {step}/{self.total}" if self.total else f"step {step}"
        self.show(count, fraction, describe(row, eta, memory), now=self.first or fraction >= 1)
        self.first = False


def describe(row: dict, eta: float, memory: int | None) -> str:
    """A step's metrics on one line. acceptance: conditional, by depth."""
    acceptance = " ".join(f"{a:.2f}" for a in row["acceptance_by_depth"])
    parts = [
        f"loss {row['loss']:.3f}",
        f"acceptance {acceptance}",
        f"tau~{row['tau_simulated']:.2f}",
        f"{row['tokens_per_second']:.0f} tok/s",
        f"{row['steps_per_second']:.2f} steps/s",
        f"ETA {clock(eta)}",
    ]
    if memory:
        parts.append(f"{memory / 2**30:.1f} GiB")
    return "  ".join(parts)
