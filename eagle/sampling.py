"""What a request asks of the choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.choose import choose

from .errors import EagleError

GREEDY = 1e-5
LARGEST, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy, and so is one below 1e-5, whose scores float32 cannot hold. Numbers
    are kept as the float32 that kernels see, so that a row is the same alone and in company."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= LARGEST:
            said = f"temperature must be a number in [0, {LARGEST:.1e}] (0 is greedy)"
            raise EagleError(f"{said}, not {self.temperature}")
        if not 0 <= self.top_k < 2**63 or int(self.top_k) != self.top_k:
            raise EagleError(f"top_k must be a whole number >= 0 (0 is off), not {self.top_k}")
        for name, off in (("top_p", "0 and 1 are off"), ("min_p", "0 is off")):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise EagleError(f"{name} must lie in [0, 1] ({off}), not {getattr(self, name)}")
        if self.temperature < GREEDY:
            object.__setattr__(self, "temperature", 0.0)
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            kept = max(float(np.float32(value)), TINY) if value > 0.0 else 0.0
            object.__setattr__(self, name, kept)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Sampler:
    """The sampling of rows in flight: each parameter is a number where all rows agree, else a
    tensor [b]."""

    def __init__(self, params: list[SamplingParams], seeds: list[int], device) -> None:
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.values: dict[str, int | float | torch.Tensor] = {}
        for name in ("temperature", "top_k", "top_p", "min_p"):
            column = [getattr(p, name) for p in params]
            dtype = torch.int64 if name == "top_k" else torch.float32
            several = len(set(column)) > 1
            column = torch.tensor(column, dtype=dtype, device=device) if several else column[0]
            self.values[name] = column

    def choose(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """logits [b, N, V], positions [b, N] -> choices [b, N]."""
        return choose(logits, self.seeds, positions, **self.values)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One seed a row: seed + row for an int, so that row i alone is the request with seed + i."""
    seed = seed.tolist() if hasattr(seed, "tolist") else seed  # of numpy or torch
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()).item())
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = range(seed, seed + rows)
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else None
    if seeds is None or any(not isinstance(s, int) for s in seeds):
        raise EagleError(f"seed must be an int or one int a row, not {seed!r}")
    if len(seeds) != rows:
        said = f"{len(seeds)} seeds were given for {rows} rows"
        raise EagleError(f"{said}; give one int, or one a row")
    if any(not -(2**63) <= s < 2**63 for s in seeds):
        raise EagleError(f"seed must fit in 64 bits, signed; {seeds} does not")
    return seeds
