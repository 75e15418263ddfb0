"""What a generation is while it runs, and what it has produced.

B rows, T prompt tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .decode import Timings
from .request import Row


@dataclass
class Generation:
    """What a call produced. `sequences` [B, L]: see `EaModel.eagenerate`. exact: no token's bits
    depended on what was run beside it."""

    rows: list[Row]
    sequences: torch.Tensor
    timings: Timings
    exact: bool = False

    @property
    def new_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def cycles(self) -> int:
        """Verifications, summed over rows."""
        return sum(row.cycles for row in self.rows)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens gained per verification and row, `next_token` included."""
        gained = self.new_tokens - len(self.rows)
        return gained / self.cycles if self.cycles else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the cycles that accepted depth d - 1, the share that accepted depth d, from 1."""
        return acceptance_by_depth([row.accepted for row in self.rows])


def acceptance_by_depth(histograms: Sequence[list[int]]) -> list[float]:
    """histograms: [a] cycles with a accepted draft tokens -> conditional acceptance rate of depth
    1, 2, …"""
    depth = max((len(h) for h in histograms), default=0)
    total = [sum(h[a] for h in histograms if a < len(h)) for a in range(depth)]
    reached = [sum(total[a:]) for a in range(depth)]
    return [reached[a + 1] / reached[a] for a in range(depth - 1) if reached[a]]


@dataclass
class Span:
    """tokens: what the row at `index` gained since its last span, perhaps none when it ended."""

    index: int
    tokens: list[int]
    row: Row


@dataclass
class Start:
    """A generation about to run: `steps` yields after each cycle, `rows` grow meanwhile. tensor
    [B, T]: what was given, where it was one."""

    rows: list[Row]
    steps: Iterator
    pad: int
    tensor: torch.Tensor | None
    device: torch.device
    exact: bool

    def sequences(self) -> torch.Tensor:
        """[B, L] int64: see `EaModel.eagenerate`."""
        prompts = [r.prompt for r in self.rows] if self.tensor is None else self.tensor.tolist()
        lines = [p + r.tokens for p, r in zip(prompts, self.rows, strict=True)]
        width = max(map(len, lines))
        return torch.tensor([x + [self.pad] * (width - len(x)) for x in lines], device=self.device)


def raise_errors(rows: list[Row]) -> None:
    for row in rows:
        if row.error is not None:
            raise row.error


def show(steps: Iterator, row: Row, prompt: list[int], streamer, prompt_shown: bool) -> Iterator:
    """Hand new tokens to a transformers streamer as they are accepted."""
    if not prompt_shown:
        streamer.put(torch.tensor([prompt]))
    shown = 0
    for step in steps:
        for token in row.tokens[shown:]:
            streamer.put(torch.tensor([token]))
        shown = len(row.tokens)
        yield step
    streamer.end()
