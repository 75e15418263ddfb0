"""pass@k from counts of right programs: n programs a problem, c of them right, k drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eagle.errors import EagleError

from .problem import some

RESAMPLES = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n programs, drawn without replacement, hold one of the c right ones
    (Chen et al., 2021): 1 - C(n-c, k) / C(n, k), as a product that does not overflow. Unbiased in
    n."""
    assert 1 <= k <= n and 0 <= c <= n, (n, c, k)
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def by_problem(counts: Mapping[str, tuple[int, int]], k: int) -> dict[str, float]:
    """counts: {problem: (n, c)}, n may vary. Raises EagleError when a problem has fewer than k
    programs."""
    if short := [f"{task} ({n})" for task, (n, _) in counts.items() if n < k]:
        raise EagleError(
            f"pass@{k} needs at least {k} programs a problem; there are fewer for {some(short)}: "
            "lower --k, or generate and execute what is missing"
        )
    return {task: pass_at_k(n, c, k) for task, (n, c) in counts.items()}


def estimate(values: Sequence[float]) -> dict:
    """The mean over problems, and its interval."""
    ci95 = interval(values)
    return {
        "value": round(float(np.mean(values)), 6),
        "ci95": ci95 and [round(x, 6) for x in ci95],
        "problems": len(values),
    }


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
