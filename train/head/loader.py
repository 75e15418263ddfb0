"""Which rows a step sees, how they are cut into micro-batches, and reading them ahead of time.

The rows of a step are a function of the seed and of how many rows were seen before: a run can be
resumed at another world size, two ranks equal one, and a token budget or a smaller micro-batch
changes what a step costs but not what it learns. Nothing here needs to be saved.

B rows, T tokens of the longest row, rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from configs.schema import TrainConfig
from records import Collator, TokenizedData

WIDTH = 8  # batches are as wide as a multiple of it


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
    """Token counts of a step's rows -> micro-batches of places in it; rank r's are number r, r +
    world, …

    Rows of like length stand together, the longest first, so that padding is least and what does
    not fit into memory is met at once. Without `max_tokens`, `batch_size` rows each; with it, as
    few as keep padded rows x longest row within it, and equally many a rank.
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


@dataclass(frozen=True)
class MicroBatch:
    """What `Collator` makes of some rows, and which they are: `places` [B] of (epoch, row)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    source: torch.Tensor
    loss_weight: torch.Tensor
    places: list[tuple[int, int]]

    def pinned(self) -> MicroBatch:
        values = vars(self).items()
        pinned = {k: v.pin_memory() for k, v in values if isinstance(v, torch.Tensor)}
        return replace(self, **pinned)


class Steps:
    """Item n: the micro-batches that one rank takes of the step that begins with row number n."""

    def __init__(
        self, data: TokenizedData, cfg: TrainConfig, pad_id: int, rank: int, world: int
    ) -> None:
        self.data, self.cfg, self.rank, self.world = data, cfg, rank, world
        self.order, self.collate = RowOrder(len(data), cfg.seed), Collator(pad_id, WIDTH)
        self.rows = world * cfg.batch_size * cfg.grad_accum
        self._epoch = 0

    def __getitem__(self, start: int) -> list[MicroBatch]:
        places = self.order.take(start, self.rows)
        lengths = [self.collate.padded(self._at(place, self.data.length)) for place in places]
        parts = cut_step(lengths, self.world, self.cfg.batch_size, self.cfg.max_tokens_per_batch)
        return [self._batch([places[n] for n in part]) for part in parts[self.rank :: self.world]]

    def where(self, place: tuple[int, int]) -> str:
        """FILE:LINE of the record that a row was made of."""
        return self._at(place, self.data.where)

    def _batch(self, places: list[tuple[int, int]]) -> MicroBatch:
        rows = [self._at(place, self.data.__getitem__) for place in places]
        return MicroBatch(**self.collate(rows), places=places)

    def _at(self, place: tuple[int, int], read):
        epoch, row = place
        if epoch != self._epoch:
            self.data.set_epoch(epoch)
            self._epoch = epoch
        return read(row)


def read_ahead(steps: Steps, start: int, device: torch.device) -> Iterator[list[MicroBatch]]:
    """The steps from row `start` on, without end; a thread, which ends with the iterator, reads the
    next one while a step is computed."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(steps.__getitem__, start)
        while True:
            batches = coming.result()
            start += steps.rows
            coming = reader.submit(steps.__getitem__, start)
            yield [batch.pinned() for batch in batches] if device.type == "cuda" else batches
