"""The losses of a draft head between its distribution and the target's: definitions, and the plain
PyTorch of one tile with its gradient.

R positions, S unrolled steps, D draft vocabulary. p: the target's distribution, q: the head's, both
over the draft vocabulary; alpha = sum min(p, q), the chance that a sampled draft token is accepted
(Leviathan et al. 2023).

    soft_ce            -sum p log q
    kl                 sum p log(p / q)
    reverse_kl         sum q log(q / p)
    overlap            -log alpha      (LK loss, Samarin et al. 2026, arXiv:2602.23881)
    total_variation    1 - alpha

    focal: scale * (1 - inner)^gamma * any of them, inner = alpha or sum p q; this weight has no
    gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Loss = Literal["soft_ce", "kl", "reverse_kl", "overlap", "total_variation"]
LEAST = 1e-8  # alpha below which `overlap` is flat


@dataclass(frozen=True)
class Objective:
    """Which loss. gamma: focal exponent, None without focal. inner: "overlap" or "target_prob" (sum
    p q).
    smoothing: uniform share that is mixed into p, of soft_ce and kl only."""

    loss: Loss = "soft_ce"
    gamma: float | None = None
    scale: float = 1.0
    inner: Literal["overlap", "target_prob"] = "overlap"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        assert self.smoothing == 0 or self.loss in ("soft_ce", "kl"), self


def position_loss(
    teacher_logits: torch.Tensor, logits: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: teacher_logits, logits [..., D] -> loss [...] and overlap [...] (no
    gradient), fp32."""
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    p, q = log_p.exp(), log_q.exp()
    alpha = torch.minimum(p, q).sum(-1)
    taught = smooth(p, objective.smoothing)
    if objective.loss == "soft_ce":
        loss = -(taught * log_q).sum(-1)
    elif objective.loss == "kl":
        loss = -(taught * log_q).sum(-1) - torch.special.entr(taught).sum(-1)
    elif objective.loss == "reverse_kl":
        loss = (q * (log_q - log_p)).sum(-1)
    elif objective.loss == "overlap":
        loss = -alpha.clamp_min(LEAST).log()
    else:
        loss = 1 - alpha
    if objective.gamma is not None:
        inner = alpha if objective.inner == "overlap" else (p * q).sum(-1)
        loss = focal_weight(inner.detach(), objective) * loss
    return loss, alpha.detach()


def smooth(p: torch.Tensor, share: float) -> torch.Tensor:
    """Mix a uniform share into p."""
    return p if share == 0 else (1 - share) * p + share / p.shape[-1]


def focal_weight(inner: torch.Tensor, objective: Objective) -> torch.Tensor:
    return objective.scale * (1 - inner).clamp(0, 1) ** objective.gamma


def tile_loss_reference(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    importance: torch.Tensor,
    objective: Objective,
    grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """logits [S, R, D], teacher_logits [R, D], importance [S, R] fp32 -> loss [S, R] and overlap
    [S, R] fp32, the first best token [S, R] int64, and with `grad` importance * d loss / d logits
    [S, R, D] in the logits' dtype, which may take the logits' place.

    `position_loss` with its gradient written out, few passes and few copies."""
    kind = objective.loss
    x = logits.float()
    top, best = x.max(-1)
    q = x.softmax(-1)
    log_total = top - q.gather(-1, best[..., None]).squeeze(-1).log()
    p = teacher_logits.float().softmax(-1)
    lesser = torch.minimum(p, q)
    alpha = lesser.sum(-1)
    focal = None
    if objective.gamma is not None:
        inner = alpha if objective.inner == "overlap" else torch.mul(p, q, out=lesser).sum(-1)
        focal = focal_weight(inner, objective)
        importance = importance * focal
    slope = None
    if kind in ("soft_ce", "kl"):
        p = smooth(p, objective.smoothing)
        loss = log_total - torch.mul(p, x, out=lesser).sum(-1)
        if kind == "kl":
            loss = loss - torch.special.entr(p).sum(-1)
        if grad:
            slope = q.sub_(p)
    elif kind == "reverse_kl":
        log_p = F.log_softmax(teacher_logits.float(), dim=-1)
        ratio = torch.sub(x, log_total[..., None], out=lesser).sub_(log_p)
        loss = (q * ratio).sum(-1)
        if grad:
            slope = q.mul_(ratio.sub_(loss[..., None]))
    else:
        loss = 1 - alpha if kind == "total_variation" else -alpha.clamp_min(LEAST).log()
        if grad:
            # d alpha / d q: 1 where q is the lesser; a half where they are equal, as autograd has
            # it
            share = (q < p).to(q.dtype).add_(q == p, alpha=0.5).mul_(q)
            slope = q.mul_(share.sum(-1, keepdim=True)).sub_(share)
            if kind == "overlap":
                importance = torch.where(alpha >= LEAST, importance / alpha, 0.0)
    if focal is not None:
        loss = focal * loss
    if grad:
        slope = slope.mul_(importance[..., None]).to(logits.dtype)
    return loss, alpha, best, slope
