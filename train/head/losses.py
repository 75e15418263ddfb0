"""What a draft position is taught and how much it counts, and the loss at the head's output layer.

The losses between two distributions are `kernels.draft_loss`'s.

S unrolled steps, U supervised targets, H hidden, V target vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import LossConfig
from kernels.draft_loss import Objective, draft_loss
from train.head.teacher import Teacher


def objective_of(cfg: LossConfig) -> Objective:
    """The loss between the head's and the target's distributions that `cfg` names."""
    if cfg.name != "focal":
        return Objective(cfg.name, smoothing=cfg.label_smoothing)
    return Objective(cfg.focal_over, cfg.gamma, cfg.alpha, cfg.weight, cfg.label_smoothing)


def depth_weights(cfg: LossConfig, steps: int, decay: float) -> list[float]:
    """[S]: how much each unrolled step counts, `decay**i` unless the config lists weights."""
    if cfg.depth_weights is None:
        return [decay**i for i in range(steps)]
    assert len(cfg.depth_weights) == steps, (cfg.depth_weights, steps)
    return list(cfg.depth_weights)


def feature_loss(predicted: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """EAGLE-1's regression term (Li et al. 2024, arXiv:2401.15077, section 4.2): smooth L1 between
    the head's predicted feature and the target's, a constant; [..., H] each -> [...] fp32, the mean
    over H."""
    loss = F.smooth_l1_loss(predicted.float(), features.detach().float(), reduction="none")
    return loss.mean(-1)


class Projection(nn.Module):
    """The loss at the head's output layer. A module with a weight of its own name, as ZeRO-3
    gathers the weights of a module when it is called."""

    def __init__(self, weight: torch.Tensor, cfg: LossConfig, amp: bool) -> None:
        super().__init__()
        self.weight, self.objective, self.amp = weight, objective_of(cfg), amp
        self.loss = draft_loss

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        """hidden [S, U, H], importance [S, U] -> the fields of `DraftLoss`."""
        hidden = hidden.bfloat16() if self.amp else hidden
        found = self.loss(hidden, self.weight, teacher, importance, self.objective)
        return found.total, found.loss, found.overlap, found.right, found.known


class FeatureProjection(Projection):
    """EAGLE-1's: the output is to be the target's hidden state, and what the target's LM head makes
    of it the target's distribution. weight [V, H]: that LM head's, which is not trained."""

    def __init__(self, weight: torch.Tensor, cfg: LossConfig, amp: bool) -> None:
        super().__init__(weight.detach(), cfg, amp)
        self.on_feature = 1.0 if cfg.feature_weight is None else cfg.feature_weight
        self.on_token = 0.1 if cfg.token_weight is None else cfg.token_weight

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        total, loss, *rest = super().forward(hidden, teacher, importance)
        apart = feature_loss(hidden, teacher.hidden.expand_as(hidden))  # [S, U]
        total = self.on_token * total + self.on_feature * (apart * importance).sum()
        return total, self.on_token * loss + self.on_feature * apart.detach(), *rest
