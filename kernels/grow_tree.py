"""The bookkeeping of a draft tree, level by level: plain-PyTorch references, and the choice between
them and the C++ of grow_tree_cpu.cpp, which is used on CPU tensors once the extension is loaded.

b rows, n beams, k candidates a beam, and as many beams after it, P candidates a row, H hidden, D
draft vocabulary, M beams so far."""

from __future__ import annotations

import torch

from kernels.dispatch import fast as fast


def candidates(
    log_probs: torch.Tensor, beam_scores: torch.Tensor | None, to_target: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best continuations of each beam: log_probs [b, n, D] float32, beam_scores [b, n] (None:
    0), to_target [D] int64 -> cumulative scores [b, n*k], target tokens [b, n*k], of a beam the
    best first."""
    if fast(log_probs):
        return torch.ops.eagle_cpu.candidates(log_probs, beam_scores, to_target, k)
    best = log_probs.topk(k)
    scores = best.values if beam_scores is None else beam_scores[..., None] + best.values
    return scores.flatten(1), to_target[best.indices.flatten(1)]


def best_beams(
    scores: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor, seen: torch.Tensor, k: int
) -> tuple[torch.Tensor, ...]:
    """The k best candidates of a level become beams. scores, tokens [b, P] of the level, k a beam;
    hidden [b, m, H] and seen [b, m, M] bool of the m beams they continue -> scores, place among the
    candidates, tokens [b, k], hidden [b, k, H] of what each continues, seen [b, k, M + k]: its
    ancestors among all beams, itself included."""
    if fast(scores):
        return torch.ops.eagle_cpu.best_beams(scores, tokens, hidden, seen, k)
    b = scores.shape[0]
    beam_scores, pick = scores.topk(k)
    origin = (pick // k)[..., None]
    inherited = seen.gather(1, origin.expand(b, k, seen.shape[-1]))
    own = torch.eye(k, dtype=torch.bool, device=scores.device).expand(b, k, k)
    return (
        beam_scores,
        pick,
        tokens.gather(1, pick),
        hidden.gather(1, origin.expand(b, k, hidden.shape[-1])),
        torch.cat([inherited, own], dim=-1),
    )
