"""What a request asks of the choice of tokens. Knows nothing of trees or models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.choose import choose

from .errors import EagleError


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 0 or 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0 or self.temperature == float("inf"):
            raise EagleError(
                f"temperature must be a number >= 0 (0 is greedy), not {self.temperature}"
            )
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise EagleError(f"top_k must be a whole number >= 0 (0 is off), not {self.top_k}")
        if not 0.0 <= self.top_p <= 1.0:
            raise EagleError(f"top_p must lie in [0, 1] (0 and 1 are off), not {self.top_p}")
        if not 0.0 <= self.min_p < 1.0:
            raise EagleError(f"min_p must lie in [0, 1) (0 is off), not {self.min_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def choose(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """logits [B, N, V], seeds [B], positions [B, N] -> choices [B, N]."""
        return choose(
            logits, seeds, positions, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, min_p=self.min_p,
        )  # fmt: skip


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One seed a row: seed + row for an int, so that row i alone is the request with seed + i."""
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()).item())
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = range(seed, seed + rows)
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else None
    if seeds is None or any(not isinstance(s, int) for s in seeds):
        raise EagleError(f"seed must be an int or one int a row, not {seed!r}")
    if len(seeds) != rows:
        raise EagleError(
            f"{len(seeds)} seeds were given for {rows} rows; give one int, or one a row"
        )
    if any(not -(2**63) <= s < 2**63 for s in seeds):
        raise EagleError(f"seed must fit in 64 bits, signed; {seeds} does not")
    return seeds


def process_tree(processor, contexts: list[list[int]], tree, logits: torch.Tensor) -> torch.Tensor:
    """Run a transformers `LogitsProcessorList` at every node, on the tokens that lead to it.

    contexts: each row's committed tokens, the root included (as it is already decided); tree: a DraftTree,
    or None for the prompt's pass; logits [B, N, V] -> [B, N, V] float32. A processor sees [n, length] ids
    of one length at a time, so it is called once per row and depth.
    """
    out = logits.float().clone()
    for b, context in enumerate(contexts):
        base = torch.tensor(context, dtype=torch.int64, device=logits.device)
        if tree is None:
            out[b] = processor(base[None], out[b])
            continue
        for depth in tree.depth[b].unique().tolist():
            nodes = (tree.depth[b] == depth).nonzero()[:, 0]
            on_path = tree.mask[b, nodes] & (tree.depth[b] > 0)  # the root ends the context already
            order = torch.where(on_path, tree.depth[b], logits.shape[1] + 1).argsort(dim=-1)[
                :, :depth
            ]
            ids = torch.cat([base.expand(len(nodes), -1), tree.tokens[b][order]], dim=1)
            out[b, nodes] = processor(ids, out[b, nodes])
    return out
