"""Which draft tokens the target agrees with. One comparison a node, one masked reduction.

B rows, N nodes, K = 1 + longest path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.grow_tree import fast

from .tree import DraftTree


@dataclass
class Verdict:
    """num_accepted [B]: draft tokens kept. path [B, K]: the accepted nodes, root first, then
    padding. tokens [B, K]: what is gained, num_accepted draft tokens and then the target's next
    token."""

    num_accepted: torch.Tensor
    path: torch.Tensor
    tokens: torch.Tensor


def verify(tree: DraftTree, choices: torch.Tensor, levels: int) -> Verdict:
    """choices [B, N]: the target's token at each node. levels: longest path of draft tokens.

    A node is correct when its token is its parent's choice, and accepted when it and all its
    ancestors are. Children of a node are distinct, so the accepted nodes form one path; its deepest
    node's choice is the next token."""
    if fast(choices):
        nodes = tree.tokens, tree.parents, tree.depth
        return Verdict(*torch.ops.eagle_cpu.longest_path(*nodes, choices, levels))
    correct = tree.tokens == choices.gather(1, tree.parents)
    correct[:, 0].fill_(True)
    accepted = (correct[:, None] | ~tree.mask).all(-1)  # [B, N]
    deepest = torch.where(accepted, tree.depth, -1).argmax(-1, keepdim=True)  # [B, 1]
    return along(tree, choices, deepest, levels)


def along(tree: DraftTree, choices: torch.Tensor, deepest: torch.Tensor, levels: int) -> Verdict:
    """The verdict whose path ends at node deepest [B, 1]."""
    num_accepted = tree.depth.gather(1, deepest)
    B, N = tree.tokens.shape
    on_path = tree.mask.gather(1, deepest[..., None].expand(B, 1, N))[:, 0]  # [B, N]
    # everything else goes to a column that is cut off below
    step = torch.where(on_path, tree.depth, levels + 1)
    node = torch.arange(N, device=choices.device).expand(B, N)
    path = torch.zeros((B, levels + 2), dtype=torch.int64, device=choices.device)
    path = path.scatter(1, step, node)[:, : levels + 1]
    # the token at step j is the choice at the path's j-th node: the next accepted token, or at the
    # deepest one the target's own
    return Verdict(num_accepted[:, 0], path, choices.gather(1, path))


def force(accept: int, tree: DraftTree, choices: torch.Tensor, levels: int) -> Verdict:
    """A verdict that accepts `accept` draft tokens whatever the target chose, or the deepest path
    of a shallower tree: for measuring a cycle apart from the head. Not lossless."""
    within = tree.depth <= accept
    goal = torch.where(within, tree.depth, -1).argmax(-1, keepdim=True)
    verdict = along(tree, choices, goal, levels)
    # the tokens gained are the path's own; only the last is the target's choice
    drafted = tree.tokens.gather(1, verdict.path[:, 1:])
    step = torch.arange(levels, device=choices.device)
    kept = step < verdict.num_accepted[:, None]
    verdict.tokens[:, :-1] = torch.where(kept, drafted, verdict.tokens[:, :-1])
    return verdict
