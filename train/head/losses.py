"""What a draft position is taught, and how much it counts: from the config to numbers.

Knows settings and tensors of hidden states; the losses between two distributions are defined in
`kernels.draft_loss`, and positions and masks are known to `train.head.ttt`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from configs.schema import HeadTrainConfig, LossConfig
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


def feature_noise(cfg: HeadTrainConfig, method: str) -> float:
    """Half the width of the noise on features of a row of 512 tokens."""
    if cfg.train.feature_noise is not None:
        return cfg.train.feature_noise
    return 0.1 if method == "eagle1" else 0.0


def part_weights(cfg: LossConfig) -> tuple[float, float]:
    """How much EAGLE-1's loss on features counts, and the one on tokens."""
    feature, token = cfg.feature_weight, cfg.token_weight
    return 1.0 if feature is None else feature, 0.1 if token is None else token


def feature_loss(predicted: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """EAGLE-1's regression term (Li et al. 2024, arXiv:2401.15077, section 4.2): smooth L1 between
    the head's predicted feature and the target's, [..., H] each -> [...] fp32, the mean over H.

    0.5 d^2 where |d| < 1 and |d| - 0.5 elsewhere. The features are constants; `part_weights` says
    how much it counts beside the soft cross-entropy.
    """
    loss = F.smooth_l1_loss(predicted.float(), features.detach().float(), reduction="none")
    return loss.mean(-1)
