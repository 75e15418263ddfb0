"""The draft tree: its shape, its nodes, and which of many candidates become nodes.

B rows, N nodes (node 0 is the root), P candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.grow_tree import fast

from .errors import EagleError


@dataclass(frozen=True)
class TreeShape:
    """How far to expand and how much to keep (EAGLE-2, Li et al. 2024, arXiv:2406.16858).
    total_token: nodes verified in one pass, the root included. top_k: beams a level. depth: draft
    passes after the one that ingests the accepted tokens, as in upstream: that pass yields level 1,
    so the longest path has depth + 1 draft tokens, and a cycle gains at most depth + 2."""

    total_token: int = 60
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("total_token", "depth", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise EagleError(f"{name} must be a whole number, not {value!r}")
        if self.total_token < 2:
            raise EagleError(f"total_token must be at least 2, not {self.total_token}")
        if self.depth < 0 or self.top_k < 1:
            raise EagleError(f"depth must be >= 0 and top_k >= 1, not {self.depth}, {self.top_k}")

    @classmethod
    def parse(cls, text: str | tuple | list | TreeShape) -> TreeShape:
        """From "total_token,depth,top_k", for instance "16,4,4"."""
        if isinstance(text, TreeShape):
            return text
        try:
            parts = text.split(",") if isinstance(text, str) else list(text)
            total_token, depth, top_k = (int(p) for p in parts)
        except (TypeError, ValueError):
            said = f"tree {text!r} is neither auto nor total_token,depth,top_k"
            raise EagleError(f"{said}; write for instance --tree auto or --tree 16,4,4") from None
        return cls(total_token, depth, top_k)

    @property
    def num_nodes(self) -> int:
        return min(self.total_token, 1 + self.top_k + self.depth * self.top_k**2)

    @property
    def levels(self) -> int:
        """Draft tokens on the longest path."""
        return min(self.depth + 1, self.num_nodes - 1)

    def __str__(self) -> str:
        return f"{self.total_token},{self.depth},{self.top_k}"


@dataclass
class DraftTree:
    """tokens, parents, depth [B, N] int64; mask [B, N, N] bool (a node sees its ancestors and
    itself); scores [B, N] float32, cumulative log-probability. Parents come before children;
    parents[:, 0] = 0."""

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def root_only(cls, root: torch.Tensor) -> DraftTree:
        """A tree of one node: plain decoding. root [B]."""
        tokens = root[:, None]
        zeros = torch.zeros_like(tokens)
        mask = torch.ones((*tokens.shape, 1), dtype=torch.bool, device=root.device)
        return cls(tokens, zeros, zeros, mask, zeros.float())


def ancestors(parents: torch.Tensor, levels: int) -> torch.Tensor:
    """parents [B, N] -> [B, N, N] bool: [b, n, m] is true when m is n or one of its ancestors."""
    B, N = parents.shape
    seen = torch.eye(N, dtype=torch.bool, device=parents.device).expand(B, N, N)
    jump, reach = parents, 1
    while reach <= levels:  # pointer jumping: the known chain doubles each time
        seen = seen | seen.gather(1, jump[..., None].expand(B, N, N))
        jump = jump.gather(1, jump)
        reach *= 2
    return seen


def rerank(root, tokens, parents, scores, depth, num_nodes: int, levels: int) -> DraftTree:
    """Keep the best num_nodes - 1 of P candidates, every one with its parent.

    root [B]; tokens, parents, scores [B, P]; depth [P]. A parent is named by its candidate's place
    plus one, 0 being the root. Candidates are ordered by level, so with a stable sort a parent,
    whose cumulative log-probability is never below its child's, is always picked before it."""
    if fast(scores):
        candidates = tokens, parents, scores, depth
        return DraftTree(*torch.ops.eagle_cpu.keep_best(root, *candidates, num_nodes))
    (B, P), device = scores.shape, root.device
    # of a broken head: NaN would sort before its parent
    scores = scores.nan_to_num(nan=float("-inf"))
    keep = scores.sort(dim=-1, descending=True, stable=True).indices[:, : num_nodes - 1]
    keep = keep.sort(dim=-1).values  # [B, N-1]: by level, parents first
    place = torch.zeros((B, P + 1), dtype=torch.int64, device=device)
    order = torch.arange(1, keep.shape[1] + 1, device=device).expand_as(keep)
    place.scatter_(1, keep + 1, order)  # candidate -> node
    new_parents = place.gather(1, parents.gather(1, keep))
    zero = torch.zeros((B, 1), dtype=torch.int64, device=device)
    new_parents = torch.cat([zero, new_parents], dim=1)
    return DraftTree(
        tokens=torch.cat([root[:, None], tokens.gather(1, keep)], dim=1),
        parents=new_parents,
        depth=torch.cat([zero, depth[keep]], dim=1),
        mask=ancestors(new_parents, levels),
        scores=torch.cat([zero.float(), scores.gather(1, keep)], dim=1),
    )
