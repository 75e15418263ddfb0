"""Training-time test: the head unrolled on its own outputs (EAGLE-3, arXiv:2503.01840, section 3).

At step i, position t holds the head's output of step i-1 at t (at step 0: fc of the target's
feature at t), is paired with token t+1+i at rotary position t+i, and is taught the target's
distribution for token t+2+i, which the target gives at position t+1+i. It counts when token t+2+i
is supervised.

A position of step i > 0 sees the keys of step 0 up to t and its own keys of steps 1 … i: nothing of
any other position. So only positions that some step supervises are unrolled, and called chains; at
step 0 the others give keys and values and nothing else. Everything is packed: rows lie end to end,
padding is left out.

B rows, T tokens of the longest, N tokens of all rows, C chains and K key tokens of all rows, U
supervised targets, S steps, F features, H hidden, D draft vocabulary, V target vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import LossConfig
from eagle.heads.head import DraftHead
from train.head.attention import BLOCK, Block, Queries, UnrolledAttention
from train.head.metrics import COLUMNS
from train.head.teacher import FeatureProjection, Projection, Teacher

COMPILED_VARIANTS = 64  # graphs of one function: dtypes, and sizes that were 1


@dataclass(frozen=True)
class Plan:
    """Which positions are taught what. A place is one of the N packed tokens.

    rows, sources [U]: the row of target u, and the place where the target model gives its
    distribution. chain_rows, positions [C]: the chains, row by row, ascending. last [C]: the place
    of the last token of their rows. keys, key_positions [K]: place and position of the tokens up to
    each row's last chain; chain_keys [C]: the chains among them. chains [S, U]: the chain that is
    taught target u at step i; taught [S, U] bool: there is one. weights [B] fp32: how much a row's
    targets count. counts [S]: targets that step i has, each counted by its row's weight.
    key_counts: keys of each row; blocks, key_blocks: the chains, and all K tokens, as attention
    takes them."""

    rows: torch.Tensor
    sources: torch.Tensor
    chain_rows: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    keys: torch.Tensor
    key_positions: torch.Tensor
    chain_keys: torch.Tensor
    chains: torch.Tensor
    taught: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    key_counts: list[int]
    blocks: list[Block]
    key_blocks: list[Block]

    def to(self, device: torch.device) -> Plan:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def plan_unroll(loss_mask: torch.Tensor, steps: int, weights=None, lengths=None) -> Plan:
    """From loss_mask [B, T] bool, weights [B] (1 by default) and lengths [B] of the rows (T).
    Tokens 0 and 1 of a row cannot be drafted: nothing lies before."""
    B, T = loss_mask.shape
    weights = torch.ones(B) if weights is None else weights.float()
    lengths = torch.full((B,), T) if lengths is None else lengths
    ends = lengths.cumsum(0)
    starts = ends - lengths
    supervised = loss_mask.bool().clone()
    supervised[:, :2] = False
    rows, tokens = supervised.nonzero(as_tuple=True)
    chain = torch.zeros_like(supervised)  # position t: some step i supervises token t + 2 + i
    for i in range(min(steps, T - 2)):
        chain[:, : T - 2 - i] |= supervised[:, 2 + i :]
    if not chain.any():
        chain[0, 0] = True  # taught nothing; no pass of the head is empty
    chain_rows, positions = chain.nonzero(as_tuple=True)
    number = (chain.flatten().cumsum(0) - 1).view(B, T)
    begins = tokens - 2 - torch.arange(steps)[:, None]  # [S, U]
    taught = begins >= 0
    reach = (chain * torch.arange(1, T + 1)).amax(1)  # [B] tokens up to the last chain
    key_rows, key_positions = (torch.arange(T) < reach[:, None]).nonzero(as_tuple=True)
    first_keys = reach.cumsum(0) - reach
    return Plan(
        rows=rows,
        sources=starts[rows] + tokens - 1,
        chain_rows=chain_rows,
        positions=positions,
        last=ends[chain_rows] - 1,
        keys=starts[key_rows] + key_positions,
        key_positions=key_positions,
        chain_keys=first_keys[chain_rows] + positions,
        chains=torch.where(taught, number[rows, begins.clamp_min(0)], 0),
        taught=taught,
        weights=weights,
        counts=(taught * weights[rows]).sum(1),
        key_counts=reach.tolist(),
        blocks=_blocks(chain.sum(1).tolist(), positions.tolist()),
        key_blocks=_blocks(reach.tolist(), key_positions.tolist()),
    )


def _blocks(counts: list[int], positions: list[int]) -> list[Block]:
    """counts: queries of each row; positions of all of them."""
    blocks, start = [], 0
    for row, count in enumerate(counts):
        for first in range(0, count, BLOCK):
            size = min(BLOCK, count - first)
            blocks.append(Block(size, row, positions[start + first + size - 1] + 1))
        start += count
    return blocks


class UnrolledHead(nn.Module):
    """The module that the engine wraps: a micro-batch -> its share of the global loss, and sums."""

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
            self.projection = Projection(head.lm_head.weight, loss, amp)
        else:
            self.projection = FeatureProjection(output, loss, amp)
        self.steps, self.amp, self.recompute = steps, amp, recompute
        self.depth_weights = loss.depth_weights or [decay**i for i in range(steps)]

    def compile_layers(self) -> None:
        """Compile in place, lazily: the first step builds two graphs a pass, before and after
        attention, which works in blocks of each row and stays as it is."""

        class Opaque(UnrolledAttention):
            __call__ = torch.compiler.disable(UnrolledAttention.__call__)

        self.attention = Opaque
        config = torch._dynamo.config
        config.recompile_limit = max(COMPILED_VARIANTS, config.recompile_limit)
        for layer in self.head.decoder_layers:
            layer.compile(dynamic=True)
        self._first = torch.compile(self._first, dynamic=True)

    def _pass(self, run, *args) -> torch.Tensor:
        """One pass of the head; with `recompute` only its inputs are kept for the backward pass."""
        if not (self.recompute and torch.is_grad_enabled()):
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def _first(self, features, embeds, plan: Plan, attend) -> torch.Tensor:
        """Step 0: keys and values of all K tokens in every layer, and the output of chains alone.
        features [1, K, F], embeds [1, K, H] of the tokens that follow -> [1, C, H]."""
        hidden = self.head.fuse(features).to(embeds.dtype)
        positions = plan.key_positions[None]
        return self.head(hidden, embeds, positions, attend, keep=plan.chain_keys)

    def unroll(self, features: torch.Tensor, embeds: torch.Tensor, plan: Plan) -> Iterator:
        """features [N, F], embeds [N, H] of the rows' tokens -> yields, for each step, the head's
        output [C, H] for the chains."""
        dtype, layers = self.head.fc.weight.dtype, self.head.config.num_layers
        chains = Queries(plan.blocks, plan.positions)
        every = Queries(plan.key_blocks, plan.key_positions)  # below the last layer all go on
        first = [every] * (layers - 1) + [chains]
        attention = [self.attention(plan.key_counts, chains, queries) for queries in first]

        def attend(step: int, layer: int, q, k, v) -> torch.Tensor:
            return attention[layer](step, q, k, v)

        known = features[plan.keys][None]
        hidden = self._pass(
            self._first,
            known if self.amp else known.to(dtype),
            embeds[(plan.keys + 1).clamp_max(len(embeds) - 1)][None].to(dtype),
            plan,
            partial(attend, 0),
        )
        yield hidden[0]
        places = plan.keys[plan.chain_keys]
        for i in range(1, self.steps):
            # past the row's end there is no token, and nothing that is supervised
            token = embeds[torch.minimum(places + 1 + i, plan.last)][None].to(dtype)
            rotary = plan.positions[None] + i
            hidden = self._pass(self.head, hidden, token, rotary, partial(attend, i))
            yield hidden[0]

    def forward(self, features, embeds, plan: Plan, teacher: Teacher, totals) -> tuple:
        """totals [S]: `counts` of the global batch -> loss, Σ depth weight · Σ weight · loss /
        totals[i], and sums [B, S, len(COLUMNS)] of each row for the metrics, unweighted."""
        with torch.autocast(embeds.device.type, torch.bfloat16, enabled=self.amp):
            steps = zip(self.unroll(features, embeds, plan), plan.chains, strict=True)
            hidden = [self.head.last_norm(out).index_select(0, chains) for out, chains in steps]
            depths = totals.new_tensor(self.depth_weights) / totals.clamp_min(1e-9)
            importance = plan.taught * depths[:, None] * plan.weights[plan.rows]
            total, *found = self.projection(torch.stack(hidden), teacher, importance)
        return total, row_sums(plan, *found)


@torch.no_grad()
def row_sums(plan: Plan, loss, overlap, right, known) -> torch.Tensor:
    """loss, overlap, right [S, U], known [U] -> [B, S, len(COLUMNS)] fp32, what the metrics are
    made of."""
    S, B, taught = len(plan.taught), len(plan.weights), plan.taught
    known = known & taught
    right = right & taught
    loss, overlap = (torch.where(known, x, 0.0) for x in (loss, overlap))
    counted = torch.stack([x.float() for x in (loss, taught, known, right, overlap)], -1)
    by_row = counted.new_zeros(S, B, counted.shape[-1]).index_add_(1, plan.rows, counted)
    held = torch.ones_like(plan.positions, dtype=torch.bool)  # all depths so far taught and right
    chains = []
    for places, *both in zip(plan.chains, taught, right, strict=True):
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
