"""Training-time test: the head unrolled on its own outputs (EAGLE-3, arXiv:2503.01840, section 3).

At step i, position t holds the head's output of step i-1 at t (at step 0: fc of the target's feature at
t), is paired with token t+1+i at rotary position t+i, and is taught the target's distribution for token
t+2+i, which the target gives at position t+1+i. It counts when token t+2+i is supervised.

A position of step i > 0 sees the keys of step 0 up to t and its own keys of steps 1 … i: nothing of any
other position. So only positions that some step supervises are unrolled beyond step 0.

B rows, T tokens (padding on the right), M unrolled positions a row, U supervised targets, S steps,
H hidden, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import LossConfig
from eagle.head import Eagle3Head
from eagle.target import Target
from train.head.losses import token_losses
from train.head.metrics import COLUMNS


@dataclass(frozen=True)
class Plan:
    """Which positions are taught what, from the loss mask alone.

    rows, sources [U]: target u is the distribution that the target model gives at (row, source), for the
    supervised token after it. positions [B, M]: the unrolled positions, padded with 0. slots [B, T]: where
    a position stands in `positions`. counts [S]: targets that step i has.
    """

    rows: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device) -> Plan:
        return Plan(**{name: value.to(device) for name, value in vars(self).items()})


def plan_unroll(loss_mask: torch.Tensor, steps: int) -> Plan:
    """loss_mask [B, T] bool -> Plan. Token 0 and 1 of a row cannot be drafted: nothing lies before."""
    B, T = loss_mask.shape
    supervised = loss_mask.bool().clone()
    supervised[:, :2] = False
    rows, tokens = supervised.nonzero(as_tuple=True)
    sources = tokens - 1
    counts = torch.stack([(sources >= 1 + i).sum() for i in range(steps)])
    needed = torch.zeros_like(supervised)  # position t: some step i supervises token t + 2 + i
    for i in range(steps):
        if T > 2 + i:
            needed[:, : T - 2 - i] |= supervised[:, 2 + i :]
    width = max(1, int(needed.sum(1).max()))
    order = torch.argsort(~needed, dim=1, stable=True)[
        :, :width
    ]  # needed positions first, ascending
    real = torch.arange(width) < needed.sum(1, keepdim=True)
    slots = (needed.cumsum(1) - 1).clamp_min(0)
    return Plan(rows, sources, order.masked_fill(~real, 0), slots, counts)


@dataclass(frozen=True)
class Teacher:
    """p [U, D]: the target's distribution within the draft vocabulary. best [U]: its argmax in all of V.
    known [U] bool: the argmax is in the draft vocabulary; other targets teach nothing (as upstream)."""

    p: torch.Tensor
    best: torch.Tensor
    known: torch.Tensor


@torch.no_grad()
def teach(
    target: Target, hidden: torch.Tensor, plan: Plan, draft_ids: torch.Tensor, in_draft: torch.Tensor,
    block: int = 2048,
) -> Teacher:  # fmt: skip
    """hidden [B, T, H] (the target's, after its final norm) -> Teacher; V-wide logits only block by block."""
    chosen = hidden[plan.rows, plan.sources]  # [U, H]
    p, best = [], []
    for part in chosen.split(block):
        logits = target.head_logits(part)
        best.append(logits.argmax(-1))
        p.append(F.softmax(logits[:, draft_ids].float(), dim=-1))
    if not p:
        empty = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        return Teacher(torch.zeros(0, len(draft_ids), device=hidden.device), empty, empty.bool())
    best_ids = torch.cat(best)
    return Teacher(torch.cat(p), best_ids, in_draft[best_ids])


class UnrolledAttention:
    """The `attend` of each step. Step 0 is causal; later ones add their own diagonal to step 0's keys."""

    def __init__(self, positions: torch.Tensor, length: int) -> None:
        later = torch.arange(length, device=positions.device) > positions[..., None]  # [B, M, T]
        self.hidden_keys = later[:, None, None]
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def first(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, Hq, T, hd], k and v [B, Hkv, T, hd] -> [B, T, Hq, hd]."""
        self.keys, self.values = [k], [v]
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    def later(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, Hq, M, hd], k and v [B, Hkv, M, hd] -> [B, M, Hq, hd]; one softmax over both kinds of key."""
        self.keys.append(k)
        self.values.append(v)
        B, Hq, M, hd = q.shape
        Hkv = k.shape[1]
        q = q * hd**-0.5
        base = q.reshape(B, Hkv, -1, hd) @ self.keys[0].transpose(2, 3)  # [B, Hkv, G*M, T]
        base = (
            base.view(B, Hkv, Hq // Hkv, M, -1).float().masked_fill(self.hidden_keys, float("-inf"))
        )
        grouped = q.view(B, Hkv, Hq // Hkv, M, hd)
        own = [
            (grouped * key[:, :, None]).sum(-1, keepdim=True) for key in self.keys[1:]
        ]  # [B, Hkv, G, M, 1]
        weights = torch.cat([base, *[o.float() for o in own]], dim=-1).softmax(-1)
        T = base.shape[-1]
        context = weights[..., :T].reshape(B, Hkv, -1, T).to(v.dtype) @ self.values[0]
        context = context.view(B, Hkv, Hq // Hkv, M, hd)
        for i, value in enumerate(self.values[1:]):
            context = context + weights[..., T + i, None] * value[:, :, None]
        return context.reshape(B, Hq, M, hd).transpose(1, 2).to(v.dtype)


class UnrolledHead(nn.Module):
    """The module that the engine wraps: one micro-batch -> its share of the global loss, and sums."""

    def __init__(
        self, head: Eagle3Head, steps: int, decay: float, loss: LossConfig, amp: bool
    ) -> None:
        super().__init__()
        self.head = head
        self.steps, self.decay, self.loss, self.amp = steps, decay, loss, amp

    def unroll(self, features: torch.Tensor, embeds: torch.Tensor, plan: Plan):
        """features [B, T, 3H], embeds [B, T, H] of the row's tokens -> yields, for each step, the pre-norm
        hidden [B, M, H] at `plan.positions`."""
        B, T, H = embeds.shape
        attention = UnrolledAttention(plan.positions, T)
        dtype = self.head.fc.weight.dtype
        embeds = embeds.to(dtype)
        place = torch.arange(T, device=embeds.device).expand(B, T)
        following = torch.cat(
            [embeds[:, 1:], embeds[:, -1:]], dim=1
        )  # the last position has no next token
        hidden = self.head.fc(features.to(dtype)).to(dtype)
        hidden = self.head(hidden, following, place, attention.first)
        hidden = hidden.gather(1, plan.positions[..., None].expand(-1, -1, hidden.shape[-1]))
        yield hidden
        for i in range(1, self.steps):
            token = (plan.positions + 1 + i).clamp_max(
                T - 1
            )  # past the row's end: never supervised
            following = embeds.gather(1, token[..., None].expand(-1, -1, H))
            hidden = self.head(hidden, following, plan.positions + i, attention.later)
            yield hidden

    def forward(
        self,
        features: torch.Tensor,
        embeds: torch.Tensor,
        plan: Plan,
        teacher: Teacher,
        totals: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """totals [S]: targets of each step in the global batch -> loss, Σ decay^i · Σ loss / totals[i], and
        sums [S, len(COLUMNS)] for the metrics."""
        with torch.autocast(embeds.device.type, torch.bfloat16, enabled=self.amp):
            return self._forward(features, embeds, plan, teacher, totals)

    def _forward(self, features, embeds, plan, teacher, totals):
        shape = plan.positions.shape
        reached = torch.ones(
            shape, dtype=torch.bool, device=embeds.device
        )  # all earlier depths were right
        supervised = reached.clone()  # and were supervised
        total, sums = embeds.new_zeros((), dtype=torch.float32), []
        for i, hidden in enumerate(self.unroll(features, embeds, plan)):
            chosen = plan.sources >= 1 + i
            rows, starts = plan.rows[chosen], plan.sources[chosen] - 1 - i
            slots = plan.slots[rows, starts]
            logits = self.head.logits(hidden[rows, slots])
            known = teacher.known[chosen]
            losses, accepted = token_losses(teacher.p[chosen], logits, self.loss)
            loss = (losses * known).sum()
            total = total + self.decay**i * loss / totals[i].clamp_min(1)
            with torch.no_grad():
                right = self.head.to_target(logits.argmax(-1)) == teacher.best[chosen]
                now = torch.zeros(shape, dtype=torch.bool, device=embeds.device)
                hit = now.clone()
                now[rows, slots] = True
                hit[rows, slots] = right
                supervised &= now
                asked = (reached & supervised).sum()
                reached &= hit
                counted = (loss, chosen.sum(), known.sum(), right.sum(), (accepted * known).sum(),
                           asked, (reached & supervised).sum())  # fmt: skip
                sums.append(torch.stack([value.detach().float() for value in counted]))
        assert len(COLUMNS) == len(counted)
        return total, torch.stack(sums)
