"""Batches of a step, read and padded ahead of time by worker processes.

What a step holds is a function of its first row alone, so nothing here needs to be saved or
restored, and the number of workers changes nothing but the time a step waits for its data.

B rows, T tokens of the longest row, rounded up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch.utils.data import DataLoader, Dataset

from records import Collator, TokenizedData
from train.head.order import RowOrder, cut_step

WIDTH = 8  # batches are as wide as a multiple of it
MAX_WORKERS = 4  # a step's rows take a few milliseconds to read: more would only wait


@dataclass(frozen=True)
class MicroBatch:
    """What `Collator` makes of some rows, and which they are: `places` [B] of (epoch, row)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    source: torch.Tensor
    loss_weight: torch.Tensor
    places: list[tuple[int, int]]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "places"}

    def cut(self, pieces: int) -> list[MicroBatch]:
        """The rows in at most `pieces` parts, each as wide as its longest row."""
        if pieces == 1:
            return [self]
        rows = len(self.places)
        size = -(-rows // pieces)
        parts = []
        for start in range(0, rows, size):
            part = {name: value[start : start + size] for name, value in self._tensors().items()}
            longest = int(part["attention_mask"].sum(1).max())
            width = -(-longest // WIDTH) * WIDTH
            for name in ("input_ids", "attention_mask", "loss_mask"):
                part[name] = part[name][:, :width]
            parts.append(MicroBatch(**part, places=self.places[start : start + size]))
        return parts

    def pin_memory(self) -> MicroBatch:
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return MicroBatch(**pinned, places=self.places)


class Steps(Dataset):
    """Item n: the micro-batches that one rank takes of the step that begins with row number n."""

    def __init__(
        self,
        data: TokenizedData,
        order: RowOrder,
        pad_id: int,
        rank: int,
        world: int,
        *,
        batch_size: int,
        grad_accum: int,
        max_tokens: int | None = None,
    ) -> None:
        self.data, self.order, self.collate = data, order, Collator(pad_id, WIDTH)
        self.rank, self.world = rank, world
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.rows = world * batch_size * grad_accum
        self._epoch = 0

    def __getitem__(self, start: int) -> list[MicroBatch]:
        places = self.order.take(start, self.rows)
        lengths = [self.collate.padded(self._at(place, self.data.length)) for place in places]
        parts = cut_step(lengths, self.world, self.batch_size, self.max_tokens)
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


class Loader:
    """Iterates over the steps from row `start` on, without end."""

    def __init__(self, steps: Steps, device: torch.device, num_workers: int | None) -> None:
        self.steps = steps
        self.num_workers = choose_workers(device) if num_workers is None else num_workers
        self.pinned = device.type == "cuda"

    def from_row(self, start: int) -> Iterator[list[MicroBatch]]:
        ahead = {"prefetch_factor": 2} if self.num_workers else {}
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(start, 2**62, self.steps.rows),
            num_workers=self.num_workers,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # of its own: the run's is not to be drawn from
            **ahead,
        )
        with without_signals():
            return iter(loader)


def choose_workers(device: torch.device) -> int:
    """Cores beyond one for each process of this machine, up to four. Without a GPU the cores have
    the model to compute, and a step's data takes a thousandth of its time: none."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    return max(0, min(MAX_WORKERS, cores // processes - 1))


@contextmanager
def without_signals():
    """Processes started here are deaf to signals from their first instruction on. A Ctrl-C reaches
    every process of the
    terminal: the run decides, and needs its data until then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
