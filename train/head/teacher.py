"""What the frozen target tells the head: features, final hidden states, and from these its
distributions; and the loss against them at the head's output layer (`kernels.draft_loss`). Rows are
packed: their tokens lie end to end, padding is left out.

B rows, T tokens of the longest, N tokens of all rows, S unrolled steps, U supervised targets, R of
a tile, H hidden, F features (3 x hidden), D draft vocabulary, V target vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import HeadTrainConfig, LossConfig
from eagle.attention import TreeContext
from eagle.cache import StaticKVCache
from eagle.target import Target
from kernels.draft_loss import Objective, draft_loss

LOGITS = 2**22  # of the target's vocabulary, held at a time on a CPU; 2^26 on a GPU


class PackedRows(TreeContext):
    """A causal pass over whole rows that keeps no keys: padding is not run. On a CPU rows attend
    one by one, each over its own length; elsewhere they are padded for the attention."""

    def __init__(self, target: Target, lengths: list[int], width: int) -> None:
        rows, device = len(lengths), target.device
        cache = StaticKVCache(0, rows, 1, width, 1, target.dtype, device)
        positions = torch.arange(width, device=device).expand(rows, width)
        super().__init__(cache, positions, counts=lengths)
        self.lengths = lengths

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing comes after these rows."""

    def attend(self, layer, q, k, v, scaling, window=None, softcap=None, sinks=None):
        if q.is_cuda or not (window is None and softcap is None and sinks is None):
            return super().attend(layer, q, k, v, scaling, window, softcap, sinks)
        self.layers_seen += 1
        groups = q.shape[1] > k.shape[1]
        rows = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        out = [
            F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=groups)
            for row in rows
        ]
        return torch.cat(out, dim=2).transpose(1, 2)


@torch.no_grad()
def hidden_and_features(states, ids: torch.Tensor, mask: torch.Tensor) -> tuple:
    """Of `states`, a `Target` or a `FeatureStore`: ids [B, T] with padding on the right, mask [B,
    T] 1 on real tokens -> packed hidden [N, H] (what enters the target's output embedding) and
    features [N, F]."""
    lengths = mask.sum(1).tolist()
    if not isinstance(states, Target):
        return states.hidden_and_features(ids, lengths)
    context = PackedRows(states, lengths, ids.shape[1])
    entered = []
    output = states.model.get_output_embeddings()
    # before the target's own hook, which keeps one token so that hardly any logits are made here
    hook = output.register_forward_pre_hook(
        lambda module, args: entered.append(args[0]), prepend=True
    )
    try:
        one = torch.zeros(1, dtype=torch.int64, device=ids.device)
        positions = context.pack(context.positions)
        _, features = states.run(context, context.pack(ids), positions, keep=one)
    finally:
        hook.remove()
    return entered[0][0], features[0]


def feature_noise(cfg: HeadTrainConfig, method: str) -> float:
    """Half the width of the noise on features of a row of 512 tokens."""
    given = cfg.train.feature_noise
    return (0.1 if method == "eagle1" else 0.0) if given is None else given


def with_noise(features: torch.Tensor, mask: torch.Tensor, width: float) -> torch.Tensor:
    """features [N, F] of the tokens in mask [B, T], plus uniform noise of ± width · 512 / length: a
    head's own features are not exact (Li et al. 2024, section 4.2; scaled as the authors' code)."""
    if width == 0:
        return features
    real = mask.bool()
    wide = torch.rand(*mask.shape, features.shape[-1], dtype=features.dtype, device=features.device)
    lengths = real.sum(1)
    scale = (width * 512 / lengths.clamp_min(1)).to(features.device, features.dtype)
    return features + (2 * wide[real] - 1) * scale.repeat_interleave(lengths)[:, None]


@dataclass(frozen=True)
class Teacher:
    """The target's distributions at U positions, a `kernels.draft_loss.Teacher`: made when asked.

    hidden [U, H]: the target's, after its final norm. draft_ids [D]: target ids of the draft
    vocabulary. to_draft [V]: draft id of each target id, -1 outside."""

    target: Target
    hidden: torch.Tensor
    draft_ids: torch.Tensor
    to_draft: torch.Tensor

    @classmethod
    def of(cls, target: Target, hidden: torch.Tensor, draft_ids: torch.Tensor) -> Teacher:
        to_draft = torch.full((target.vocab_size,), -1, dtype=torch.int64, device=draft_ids.device)
        to_draft[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
        return cls(target, hidden, draft_ids, to_draft)

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions start … stop - 1 -> logits [R, D] over the draft vocabulary, and the draft id
        [R] of the best token of all V: -1 where the head cannot propose it."""
        V, cpu = len(self.to_draft), not self.hidden.is_cuda
        block = max(1, (LOGITS if cpu else 16 * LOGITS) // V)
        kept, best = [], []
        for part in self.hidden[start:stop].split(block):
            logits = self.target.head_logits(part)
            logits = logits.float() if cpu else logits  # much faster to search and pick from there
            best.append(logits.argmax(-1))
            kept.append(logits.index_select(-1, self.draft_ids))
        return torch.cat(kept), self.to_draft[torch.cat(best)]


def objective_of(cfg: LossConfig) -> Objective:
    """The loss between the head's and the target's distributions that `cfg` names."""
    if cfg.name != "focal":
        return Objective(cfg.name, smoothing=cfg.label_smoothing)
    return Objective(cfg.focal_over, cfg.gamma, cfg.alpha, cfg.weight, cfg.label_smoothing)


class Projection(nn.Module):
    """The loss at the head's output layer. A module with a weight of its own name, as ZeRO-3
    gathers the weights of a module when it is called."""

    loss = staticmethod(draft_loss)

    def __init__(self, weight: torch.Tensor, cfg: LossConfig, amp: bool) -> None:
        super().__init__()
        self.weight, self.objective, self.amp = weight, objective_of(cfg), amp

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        """hidden [S, U, H], importance [S, U] -> the fields of `DraftLoss`."""
        hidden = hidden.bfloat16() if self.amp else hidden
        found = self.loss(hidden, self.weight, teacher, importance, self.objective)
        return found.total, found.loss, found.overlap, found.right, found.known


class FeatureProjection(Projection):
    """EAGLE-1's (Li et al. 2024, arXiv:2401.15077, section 4.2): the output is to be the target's
    hidden state (smooth L1), and what the target's LM head makes of it the target's distribution.
    weight [V, H]: that LM head's, which is not trained."""

    def __init__(self, weight: torch.Tensor, cfg: LossConfig, amp: bool) -> None:
        super().__init__(weight.detach(), cfg, amp)
        self.on_feature = 1.0 if cfg.feature_weight is None else cfg.feature_weight
        self.on_token = 0.1 if cfg.token_weight is None else cfg.token_weight

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        total, loss, *rest = super().forward(hidden, teacher, importance)
        wanted = teacher.hidden.expand_as(hidden).float()
        apart = F.smooth_l1_loss(hidden.float(), wanted, reduction="none").mean(-1)  # [S, U]
        total = self.on_token * total + self.on_feature * (apart * importance).sum()
        return total, self.on_token * loss + self.on_feature * apart.detach(), *rest
