"""Muon for the head's matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes orthogonalised steps;
its update is scaled to AdamW's size, so both take the same learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from configs.schema import TrainConfig
from eagle.errors import EagleError


class MuonAdamW(torch.optim.Optimizer):
    """`named`: (name, parameter). Matrices except `lm_head` go to Muon."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], cfg: TrainConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise EagleError(
                "train.optimizer=muon needs torch 2.9 or newer; use train.optimizer=adamw"
            )
        named = list(named)
        matrices = [p for name, p in named if p.ndim == 2 and "lm_head" not in name]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        shared = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(rest, betas=tuple(cfg.betas), **shared),
        ]
        super().__init__([{"params": [p for _, p in named]}], {"lr": cfg.lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()
