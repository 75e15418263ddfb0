"""Which rows a step sees, how they are cut into micro-batches, and reading them ahead of time.

The rows of a step are a function of the seed and of how many rows were seen before: nothing needs
to be saved, and other world sizes or cuts change what a step costs but not what it learns.

B rows, T tokens of the longest row, rounded up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from configs.schema import TrainConfig
from records import Collator, TokenizedData

WIDTH = 8  # batches are as wide as a multiple of it


@lru_cache(2)
def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def row_order(rows: int, seed: int | None, start: int, count: int) -> list[tuple[int, int]]:
    """(epoch, row) number start, …, start + count - 1 of an endless sequence of permutations;
    without a seed, of rows that have another order in each epoch already."""
    numbers = [divmod(n, rows) for n in range(start, start + count)]
    if seed is None:
        return numbers
    return [(epoch, int(permutation(rows, seed, epoch)[place])) for epoch, place in numbers]


def cut_step(
    lengths: Sequence[int], world: int, batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Token counts of a step's rows -> micro-batches of places in it; rank r's are number r, r +
    world, …

    Rows of like length stand together, the longest first: little padding, and what does not fit
    into memory is met at once. `batch_size` rows each, or as few batches as keep padded rows x
    longest row within `max_tokens`, equally many a rank."""
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

    def __init__(self, data: TokenizedData, cfg: TrainConfig, pad_id: int, rank: int, world: int):
        self.data, self.cfg, self.rank, self.world = data, cfg, rank, world
        self.collate = Collator(pad_id, WIDTH)
        self.rows = world * cfg.batch_size * cfg.grad_accum
        self._epoch = 0

    def __getitem__(self, start: int) -> list[MicroBatch]:
        seed = None if self.data.shuffled else self.cfg.seed
        places = row_order(len(self.data), seed, start, self.rows)
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
    """The steps from row `start` on, without end; a thread reads one while another is computed."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(steps.__getitem__, start)
        while True:
            batches = coming.result()
            start += steps.rows
            coming = reader.submit(steps.__getitem__, start)
            yield [batch.pinned() for batch in batches] if device.type == "cuda" else batches
