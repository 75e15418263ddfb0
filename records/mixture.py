"""Several data sets as one, by index; what a row holds does not matter here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eagle.errors import EagleError


class RoundRobin:
    """Every row of every source once, sources taking turns: the evaluation order of a mixture."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = list(sources)
        lengths = np.array([len(source) for source in sources], dtype=np.int64)
        order = np.repeat(np.arange(len(lengths)), lengths)
        rows = np.arange(len(order)) - np.repeat(lengths.cumsum() - lengths, lengths)
        turns = np.lexsort((order, rows))
        self.order, self.rows = order[turns], rows[turns]

    def __len__(self) -> int:
        return len(self.order)

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, its row) at a place of this epoch."""
        return int(self.order[index]), int(self.rows[index])

    def __getitem__(self, index: int) -> Any:
        source, row = self.locate(index)
        return self.sources[source][row]


class MixtureDataset(RoundRobin):
    """Source `s` fills the share `weights[s] / sum(weights)` of an epoch, which lasts until every
    source has been seen whole; short ones repeat meanwhile. Each pass over a source is a fresh
    permutation. The order is a pure function of (seed, epoch): restorable by position."""

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        for source, weight in zip(sources, weights, strict=True):
            if len(source) == 0:
                raise EagleError("a source of the mixture is empty: remove it")
            if not (weight > 0 and math.isfinite(weight)):
                raise EagleError(f"mixture weight {weight} must be a positive number")
        self.sources = list(sources)
        self.seed = seed
        total = max(len(s) * sum(weights) / w for s, w in zip(sources, weights, strict=True))
        shares = (total * w / sum(weights) for w in weights)
        self.counts = [max(len(s), round(share)) for s, share in zip(sources, shares, strict=True)]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Precompute the order of one epoch: which source, and which of its rows, at each place."""
        self.epoch = epoch
        rng = np.random.default_rng([self.seed, epoch])
        order = np.repeat(np.arange(len(self.sources)), self.counts)
        rng.shuffle(order)
        rows = np.empty(len(order), dtype=np.int64)
        for n, (source, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            passes = [rng.permutation(len(source)) for _ in range(-(-count // len(source)))]
            rows[order == n] = np.concatenate(passes)[:count]
        self.order, self.rows = order, rows
