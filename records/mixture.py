"""Several data sets as one, by index; what a row holds does not matter here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from eagle.errors import EagleError

BLOCK = 1 << 16  # rows of an epoch whose order is made at once
MOST = 1 << 40  # rows of an epoch


class RoundRobin:
    """Every row of every source once, sources taking turns: the evaluation order of a mixture."""

    shuffled = False

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
    """Source `s` fills the share `weights[s] / sum(weights)` of an epoch, and of each stretch of
    it. An epoch lasts until every source has been seen whole; short ones repeat meanwhile. Each
    pass over a source is a fresh permutation. The order is a pure function of (seed, epoch,
    position), made by blocks when they are asked for: a small weight makes a long epoch, and its
    memory is that of a permutation of each source. Raises EagleError above `MOST` rows."""

    shuffled = True  # whoever trains on it need not

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        for source, weight in zip(sources, weights, strict=True):
            if len(source) == 0:
                raise EagleError("a source of the mixture is empty: remove it")
            if not (weight > 0 and math.isfinite(weight)):
                raise EagleError(f"mixture weight {weight} must be a positive number")
        self.sources, self.seed, self.epoch = list(sources), seed, 0
        needed = [len(s) * sum(weights) / w for s, w in zip(sources, weights, strict=True)]
        longest = max(range(len(needed)), key=needed.__getitem__)
        if not needed[longest] <= MOST:
            raise EagleError(
                f"with weight {weights[longest]:g} of {sum(weights):g}, an epoch of the mixture is "
                f"{needed[longest]:.3g} rows long until source {longest + 1} has been seen whole; "
                "raise its weight, or leave it out"
            )
        shares = (needed[longest] * w / sum(weights) for w in weights)
        self.counts = [max(len(s), round(share)) for s, share in zip(sources, shares, strict=True)]
        self.plan = ("blocks", *self.counts)
        self._block = lru_cache(2)(self._make_block)
        self._pass: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(int(index), BLOCK)
        order, rows = self._block(self.epoch, number)
        return int(order[place]), int(rows[place])

    def _make_block(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and row of each place of a block."""
        before, here = self._shares(epoch, number)
        order = np.repeat(np.arange(len(here)), here)
        np.random.default_rng([self.seed, epoch, number]).shuffle(order)
        rows = np.empty(len(order), dtype=np.int64)
        for source, (first, count) in enumerate(zip(before, here, strict=True)):
            size, found = len(self.sources[source]), []
            for turn in range(first // size, -(-(first + count) // size) if count else 0):
                start, stop = (min(max(n - turn * size, 0), size) for n in (first, first + count))
                found.append(self._permutation(source, epoch, turn)[start:stop])
            rows[order == source] = np.concatenate(found) if found else []
        return order, rows

    def _shares(self, epoch: int, number: int) -> tuple[list[int], list[int]]:
        """Rows of each source before a block and in it. The epoch is cut in two again and again;
        either part gets its share of every source, and chance has only what is left of rounding."""
        before, here = [0] * len(self.counts), self.counts
        first, last = 0, -(-len(self) // BLOCK)
        while last - first > 1:
            middle = (first + last) // 2
            size, whole = (middle - first) * BLOCK, sum(here)
            left = [n * size // whole for n in here]
            rest = [s for s, n in enumerate(here) if n * size % whole]
            rng = np.random.default_rng([self.seed, epoch, first, last])
            for s in rng.permutation(rest)[: size - sum(left)]:
                left[s] += 1
            if number < middle:
                last, here = middle, left
            else:
                before = [a + b for a, b in zip(before, left, strict=True)]
                first, here = middle, [a - b for a, b in zip(here, left, strict=True)]
        return before, here

    def _permutation(self, source: int, epoch: int, turn: int) -> np.ndarray:
        """Of a source's rows, in its pass number `turn`; the last one of each is kept."""
        if source not in self._pass or self._pass[source][0] != (epoch, turn):
            rng = np.random.default_rng([self.seed, epoch, source, turn])
            self._pass[source] = (epoch, turn), rng.permutation(len(self.sources[source]))
        return self._pass[source][1]
