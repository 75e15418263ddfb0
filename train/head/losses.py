"""What a draft position is taught, and how much it counts: from the config to numbers.

Knows settings and tensors of hidden states; the losses between two distributions are defined in
`kernels.draft_loss`, and positions and masks are known to `train.head.ttt`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from configs.schema import LossConfig
from kernels.draft_loss import Objective


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
    """EAGLE-1's regression term (Li et al. 2024, arXiv:2401.15077, section 4.2): smooth L1 between the
    head's predicted feature and the target's, [..., H] each -> [...] fp32, the mean over H.

    0.5 d^2 where |d| < 1 and |d| - 0.5 elsewhere. The features are constants; the paper adds a tenth of the
    soft cross-entropy to it.
    """
    loss = F.smooth_l1_loss(predicted.float(), features.detach().float(), reduction="none")
    return loss.mean(-1)
