"""Training-time test: the head unrolled on its own outputs (EAGLE-3, arXiv:2503.01840, section 3).

At step i, position t holds the head's output of step i-1 at t (at step 0: fc of the target's
feature at t), is paired with token t+1+i at rotary position t+i, and is taught the target's
distribution for token t+2+i, which the target gives at position t+1+i. It counts when token t+2+i
is supervised.

A position of step i > 0 sees the keys of step 0 up to t and its own keys of steps 1 … i: nothing of
any other position. So only positions that some step supervises are unrolled, and called chains; at
step 0 the others give keys and values and nothing else. Everything is packed: rows lie end to end,
padding is left out.

B rows, T tokens (padding on the right), C chains and N key tokens of all rows, U supervised
targets, S steps, H hidden, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import LossConfig
from eagle.heads.head import DraftHead
from kernels.draft_loss import Objective, draft_loss
from train.head.attention import BLOCK, Block, UnrolledAttention
from train.head.losses import depth_weights, feature_loss, objective_of, part_weights
from train.head.metrics import COLUMNS
from train.head.teacher import Teacher


@dataclass(frozen=True)
class Plan:
    """Which positions are taught what, from the loss mask alone.

    rows, sources [U]: target u is the distribution that the target model gives at (row, source),
      for the
    supervised token after it. chain_rows, positions [C]: the chains, row by row, ascending.
      key_rows,
    key_positions [N]: the tokens up to each row's last chain; chain_keys [C]: the chains among
      them. places
    [S, U]: the chain that is taught target u at step i; taught [S, U] bool: there is one. weights
      [B] fp32:
    how much a row's targets count. counts [S]: targets that step i has, each counted by its row's
      weight.
    blocks, key_blocks: the chains, and all N tokens, as attention takes them.
    """

    rows: torch.Tensor
    sources: torch.Tensor
    chain_rows: torch.Tensor
    positions: torch.Tensor
    key_rows: torch.Tensor
    key_positions: torch.Tensor
    chain_keys: torch.Tensor
    places: torch.Tensor
    taught: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    blocks: list[Block]
    key_blocks: list[Block]

    def to(self, device: torch.device) -> Plan:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Plan(**moved, blocks=self.blocks, key_blocks=self.key_blocks)


def plan_unroll(loss_mask: torch.Tensor, steps: int, weights: torch.Tensor | None = None) -> Plan:
    """loss_mask [B, T] bool -> Plan; weights [B], 1 by default. Token 0 and 1 of a row cannot be
    drafted: nothing lies before."""
    B, T = loss_mask.shape
    supervised = loss_mask.bool().clone()
    supervised[:, :2] = False
    rows, tokens = supervised.nonzero(as_tuple=True)
    sources = tokens - 1
    weights = torch.ones(B) if weights is None else weights.float()
    chain = torch.zeros_like(supervised)  # position t: some step i supervises token t + 2 + i
    for i in range(min(steps, T - 2)):
        chain[:, : T - 2 - i] |= supervised[:, 2 + i :]
    if not chain.any():
        chain[0, 0] = True  # taught nothing; no pass of the head is empty
    chain_rows, positions = chain.nonzero(as_tuple=True)
    number = (chain.flatten().cumsum(0) - 1).view(B, T)
    starts = sources - 1 - torch.arange(steps)[:, None]  # [S, U]
    taught = starts >= 0
    places = torch.where(taught, number[rows, starts.clamp_min(0)], 0)
    reach = (chain * torch.arange(1, T + 1)).amax(1)  # [B] tokens up to the last chain
    key_rows, key_positions = (torch.arange(T) < reach[:, None]).nonzero(as_tuple=True)
    first_keys = reach.cumsum(0) - reach
    return Plan(
        rows,
        sources,
        chain_rows,
        positions,
        key_rows,
        key_positions,
        first_keys[chain_rows] + positions,
        places,
        taught,
        weights,
        (taught * weights[rows]).sum(1),
        _blocks(chain.sum(1).tolist(), first_keys.tolist(), positions.tolist()),
        _blocks(reach.tolist(), first_keys.tolist(), key_positions.tolist()),
    )


def _blocks(chains: list[int], first_keys: list[int], positions: list[int]) -> list[Block]:
    """chains, first_keys: of each row."""
    blocks, start = [], 0
    for count, key in zip(chains, first_keys, strict=True):
        for first in range(start, start + count, BLOCK):
            stop = min(first + BLOCK, start + count)
            blocks.append(Block(first, stop, key, positions[stop - 1] + 1, positions[first] + 1))
        start += count
    return blocks


class Projection(nn.Module):
    """The loss at the head's output layer. A module with a weight of its own name, as ZeRO-3
    gathers the weights of a module when it is called."""

    def __init__(self, weight: torch.Tensor, objective: Objective, amp: bool) -> None:
        super().__init__()
        self.weight, self.objective, self.amp = weight, objective, amp
        self.loss = draft_loss

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        """hidden [S, U, H], importance [S, U] -> the fields of `DraftLoss`."""
        hidden = hidden.bfloat16() if self.amp else hidden
        found = self.loss(hidden, self.weight, teacher, importance, self.objective)
        return found.total, found.loss, found.overlap, found.right, found.known


class FeatureProjection(Projection):
    """EAGLE-1's: the output is to be the target's hidden state, and what the target's LM head makes
    of it the target's distribution. weight [V, H]: that LM head's, which is not trained."""

    def __init__(
        self, weight: torch.Tensor, objective: Objective, amp: bool, parts: tuple[float, float]
    ) -> None:
        super().__init__(weight.detach(), objective, amp)
        self.parts = parts

    def forward(self, hidden: torch.Tensor, teacher: Teacher, importance: torch.Tensor) -> tuple:
        on_feature, on_token = self.parts
        total, loss, *rest = super().forward(hidden, teacher, importance)
        apart = feature_loss(hidden, teacher.hidden.expand_as(hidden))  # [S, U]
        total = on_token * total + on_feature * (apart * importance).sum()
        return total, on_token * loss + on_feature * apart.detach(), *rest


class UnrolledHead(nn.Module):
    """The module that the engine wraps: one micro-batch -> its share of the global loss, and
    sums.
    """

    attention = UnrolledAttention

    def __init__(
        self,
        head: DraftHead,
        steps: int,
        decay: float,
        loss: LossConfig,
        amp: bool,
        recompute: bool = False,
        output: torch.Tensor | None = None,
    ) -> None:
        """output [V, H]: the target's LM head, for a head without one."""
        super().__init__()
        self.head = head
        if head.has_output:
            self.projection = Projection(head.lm_head.weight, objective_of(loss), amp)
        else:
            parts = part_weights(loss)
            self.projection = FeatureProjection(output, objective_of(loss), amp, parts)
        self.steps, self.amp, self.recompute = steps, amp, recompute
        self.depth_weights = depth_weights(loss, steps, decay)

    def _pass(self, run, *args) -> torch.Tensor:
        """One pass of the head; with `recompute` only its inputs are kept for the backward pass."""
        if not (self.recompute and torch.is_grad_enabled()):
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def _first(self, features, embeds, plan: Plan, attend) -> torch.Tensor:
        """Step 0: keys and values of all N tokens in every layer, and the output of chains alone.
        features [1, N, F], embeds [1, N, H] of the tokens that follow -> [1, C, H]."""
        hidden = self.head.fuse(features).to(embeds.dtype)
        positions = plan.key_positions[None]
        return self.head(hidden, embeds, positions, attend, keep=plan.chain_keys)

    def unroll(
        self, features: torch.Tensor, embeds: torch.Tensor, plan: Plan
    ) -> Iterator[torch.Tensor]:
        """features [B, T, F], embeds [B, T, H] of the row's tokens -> yields, for each step, the
        head's output [C, H] for the chains."""
        T, dtype = embeds.shape[1], self.head.fc.weight.dtype
        layers = self.head.config.num_layers
        every = plan.key_blocks, plan.key_positions  # below the last layer all tokens go on
        attention = [
            self.attention(plan.blocks, plan.positions, every if n + 1 < layers else None)
            for n in range(layers)
        ]

        def attend(step: int, layer: int, q, k, v) -> torch.Tensor:
            return attention[layer](step, q, k, v)

        def following(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """Past the row's end there is no token, and nothing that is supervised."""
            return embeds[rows, positions.clamp_max(T - 1)][None].to(dtype)

        packed = features[plan.key_rows, plan.key_positions][None]
        hidden = self._pass(
            self._first,
            packed if self.amp else packed.to(dtype),
            following(plan.key_rows, plan.key_positions + 1),
            plan,
            partial(attend, 0),
        )
        yield hidden[0]
        for i in range(1, self.steps):
            token = following(plan.chain_rows, plan.positions + 1 + i)
            place = plan.positions[None] + i
            hidden = self._pass(self.head, hidden, token, place, partial(attend, i))
            yield hidden[0]

    def forward(
        self,
        features: torch.Tensor,
        embeds: torch.Tensor,
        plan: Plan,
        teacher: Teacher,
        totals: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """totals [S]: `counts` of the global batch -> loss, Σ depth weight · Σ weight · loss /
        totals[i], and sums [B, S, len(COLUMNS)] of each row for the metrics, unweighted."""
        with torch.autocast(embeds.device.type, torch.bfloat16, enabled=self.amp):
            hidden = torch.stack(
                [
                    self.head.last_norm(hidden).index_select(0, places)
                    for hidden, places in zip(
                        self.unroll(features, embeds, plan), plan.places, strict=True
                    )
                ]
            )  # [S, U, H]
            depths = totals.new_tensor(self.depth_weights) / totals.clamp_min(1e-9)
            importance = plan.taught * depths[:, None] * plan.weights[plan.rows]
            total, *found = self.projection(hidden, teacher, importance)
        return total, row_sums(plan, *found)


@torch.no_grad()
def row_sums(
    plan: Plan, loss: torch.Tensor, overlap: torch.Tensor, right: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """loss, overlap, right [S, U], known [U] -> [B, S, len(COLUMNS)] fp32, what the metrics are
    made of.
    """
    S, B, taught = len(plan.taught), len(plan.weights), plan.taught
    known = known & taught
    right = right & taught
    counted = [
        torch.where(known, loss, 0.0),
        taught,
        known,
        right,
        torch.where(known, overlap, 0.0),
    ]
    counted = torch.stack([value.float() for value in counted], -1)  # [S, U, 5]
    by_row = counted.new_zeros(S, B, counted.shape[-1]).index_add_(1, plan.rows, counted)
    held = torch.ones_like(
        plan.positions, dtype=torch.bool
    )  # all depths so far were taught and right
    chains = []
    for places, *both in zip(plan.places, taught, right, strict=True):
        # other targets stand at place 0 and add nothing
        now, hit = (held.float().zero_().index_add_(0, places, x.float()) > 0 for x in both)
        asked = held & now
        held = asked & hit
        chains.append(torch.stack([asked, held], -1).float())
    chains = torch.stack(chains)  # [S, C, 2]
    by_chain = chains.new_zeros(S, B, 2).index_add_(1, plan.chain_rows, chains)
    sums = torch.cat([by_row, by_chain], -1).transpose(0, 1)
    assert sums.shape[-1] == len(COLUMNS)
    return sums
