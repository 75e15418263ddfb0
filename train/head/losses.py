"""What a draft position is taught: losses between the head's and the target's distributions.

Knows two distributions over the draft vocabulary; knows nothing of positions, masks or models.

M positions, D draft vocabulary. p: the target's probabilities, q: the head's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from configs.schema import LossConfig


def overlap(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ min(p, q) [M]: the chance that a sampled draft token is accepted."""
    return torch.minimum(p, log_q.exp()).sum(-1)


def smooth(p: torch.Tensor, share: float) -> torch.Tensor:
    """Mix a uniform share into p."""
    return p if share == 0 else (1 - share) * p + share / p.shape[-1]


def token_losses(
    p: torch.Tensor, logits: torch.Tensor, cfg: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """p [M, D] fp32, logits [M, D] -> loss [M] and overlap [M] (no gradient), both fp32.

    soft_ce: -Σ p log q. kl: soft_ce minus the entropy of p. overlap: -log Σ min(p, q).
    focal: alpha * (1 - inner)^gamma * soft_ce with a weight that has no gradient; inner is Σ min(p, q),
    the acceptance rate, so that the weight fades where drafting works; or Σ p·q ("target_prob").
    """
    log_q = F.log_softmax(logits.float(), dim=-1)
    accepted = overlap(p, log_q.detach())
    if cfg.name == "overlap":
        return -overlap(smooth(p, cfg.label_smoothing), log_q).clamp_min(1e-8).log(), accepted
    taught = smooth(p, cfg.label_smoothing)
    loss = -(taught * log_q).sum(-1)
    if cfg.name == "kl":
        loss = loss - torch.special.entr(taught).sum(-1)
    elif cfg.name == "focal":
        inner = accepted if cfg.weight == "overlap" else (p * log_q.detach().exp()).sum(-1)
        loss = cfg.alpha * (1 - inner).clamp(0, 1) ** cfg.gamma * loss
    return loss, accepted
