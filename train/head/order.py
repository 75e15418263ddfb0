"""Which rows each step sees, and how they are cut into micro-batches.

The rows of a step are a function of the seed and of how many rows were seen before, never of how
  they are
split: so a run can be resumed at another world size, two ranks equal one, and a token budget or a
  smaller
micro-batch changes what a step costs but not what it learns.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def cut_step(
    lengths: Sequence[int], world: int, batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Token counts of a step's rows -> micro-batches of places in it, rank r's are number r, r +
    world, …

    Rows of like length stand together, the longest first, so that padding is least and a
    micro-batch that does not fit into memory is met at once. Without `max_tokens`, `batch_size`
    rows each. With it, as few as keep padded rows x longest row within it, whatever `batch_size`
    says; every rank gets equally many.
    """
    assert len(lengths) % world == 0, (len(lengths), world)
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    if max_tokens is None:
        return [order[n : n + batch_size] for n in range(0, len(order), batch_size)]
    parts: list[list[int]] = []
    for n in order:
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(n)
        else:
            parts.append([n])
    while len(parts) % world:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = (len(parts[largest]) + 1) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return parts
