"""pass@k from counts of right programs. Knows numbers; knows nothing of programs, models or files.

n programs a problem, c of them right, k drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eagle.errors import EagleError

from .problems import some

RESAMPLES = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n programs, drawn without replacement, hold one of the c right ones
    (Chen et al., 2021): 1 - C(n-c, k) / C(n, k), as a product that does not overflow. Unbiased in
    n."""
    if not 1 <= k <= n:
        raise EagleError(
            f"pass@{k} needs at least {k} programs a problem and there are {n}; lower k or raise n_samples"
        )
    if not 0 <= c <= n:
        raise EagleError(f"{c} of {n} programs cannot be right")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


@dataclass(frozen=True)
class Estimate:
    """value: the mean over problems; ci95: its bootstrap interval, None where all are equal;
    detail: by problem.
    """

    value: float
    ci95: tuple[float, float] | None
    detail: dict[str, float]

    def to_json(self) -> dict:
        ci95 = self.ci95 and [round(x, 6) for x in self.ci95]
        return {"value": round(self.value, 6), "ci95": ci95, "problems": len(self.detail)}


def estimate(counts: Mapping[str, tuple[int, int]], k: int) -> Estimate:
    """counts: {problem: (n, c)}, n may vary. Raises EagleError when a problem has fewer than k
    programs, and when there is no problem."""
    if not counts:
        raise EagleError("no problem is left to score; see the excluded ones")
    short = [f"{task} ({n})" for task, (n, _) in counts.items() if n < k]
    if short:
        raise EagleError(
            f"pass@{k} needs at least {k} programs a problem; there are fewer for {some(short)}: lower --k, or "
            "generate and execute what is missing"
        )
    detail = {task: pass_at_k(n, c, k) for task, (n, c) in counts.items()}
    return Estimate(float(np.mean(list(detail.values()))), interval(list(detail.values())), detail)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95% percentile-bootstrap interval of the mean: problems are drawn with replacement, so it
    says how the score would move with other problems of the kind. None where all values are equal:
    resampling cannot tell then."""
    if len(set(values)) < 2:
        return None
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    # one resample at a time: a large set times all resamples would not fit in memory
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
