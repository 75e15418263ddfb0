"""Which rows each step sees: a function of the seed and of how many rows were seen before.

The same rows make up a step however they are split over ranks and micro-batches, so a run can be resumed
at another world size and two ranks equal one.
"""

from __future__ import annotations

import numpy as np


class RowOrder:
    """An endless sequence of row numbers: one permutation an epoch."""

    def __init__(self, rows: int, seed: int) -> None:
        assert rows > 0, rows
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, row) number start, …, start + count - 1 of the sequence."""
        out = []
        for n in range(start, start + count):
            epoch, place = divmod(n, self.rows)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            out.append((epoch, int(self._permutation[place])))
        return out


def share_of(rows: list, rank: int, world: int, batch_size: int, accum: int) -> list[list]:
    """A global batch -> the micro-batches of one rank."""
    assert len(rows) == world * batch_size * accum, (len(rows), world, batch_size, accum)
    starts = [(a * world + rank) * batch_size for a in range(accum)]
    return [rows[start : start + batch_size] for start in starts]
