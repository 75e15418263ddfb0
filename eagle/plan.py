"""tree="auto": how much to draft, decided anew in every cycle from measured costs and observed acceptance.

Knows costs, probabilities and rates; knows nothing of models, caches or tokens.

b rows in flight, k beams, P candidates, N nodes, T packed tokens.

The aim is tokens per second, a ratio of gains to time. By Dinkelbach's argument (1967) the best cycle takes
every step whose own tokens-per-time is above the rate of the whole: a node is verified when its chance of
being accepted, divided by what one more node costs, beats the going rate; a further draft pass is made when
what it may add does. With many rows a node costs more and the bar rises, so trees thin out to chains, and
where not even a root's best child is worth it, decoding is plain.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

import torch

from .tree import DraftTree, TreeShape
from .verify import Verdict

# the bounds within which a plan moves: draft passes, beams, nodes a row
WIDEST = TreeShape(total_token=48, depth=10, top_k=4)
BINS = 24  # of the draft's log-probability, down to FLOOR
FLOOR = -6.0
SETTLED = 24  # cycles before a rate is believed
PAUSE = 96  # plain cycles before speculation is tried again


@dataclass(frozen=True)
class Costs:
    """Milliseconds, measured for one number of rows. `target`: a speculative cycle without its draft passes, by
    tokens verified; `head`: a draft pass, by beams of all rows; `plain`: a plain cycle."""

    target: dict[int, float]
    head: dict[int, float]
    plain: float

    def of(self, table: dict[int, float], tokens: float) -> float:
        """Linear between the measured sizes, and beyond the last two."""
        sizes = sorted(table)
        if len(sizes) == 1 or tokens <= sizes[0]:
            return table[sizes[0]]
        right = min(bisect.bisect_left(sizes, tokens), len(sizes) - 1)
        a, b = sizes[right - 1], sizes[right]
        slope = (table[b] - table[a]) / (b - a)
        return table[a] + max(slope, 0.0) * (tokens - a)

    @property
    def per_node(self) -> float:
        """What one more node costs: the slope over trees of usual size."""
        sizes = sorted(self.target)
        last = sizes[min(3, len(sizes) - 1)]
        if last == sizes[0]:
            return 0.0
        return max((self.target[last] - self.target[sizes[0]]) / (last - sizes[0]), 1e-4)


@dataclass
class Acceptance:
    """How often nodes of a given draft probability were accepted, their ancestors included. The head's own
    probability is the prior, with the weight of a few observations."""

    tried: torch.Tensor = field(default_factory=lambda: torch.full((BINS,), 4.0))
    kept: torch.Tensor = field(
        default_factory=lambda: 4.0 * torch.exp((torch.arange(BINS) + 0.5) / BINS * FLOOR)
    )
    table: torch.Tensor | None = None

    def chances(self, scores: torch.Tensor) -> torch.Tensor:
        """scores: cumulative log-probabilities -> chances of acceptance, of the same shape; never higher
        for a lower score, so that a parent is at least as likely as its child."""
        if self.table is None:
            rates = (self.kept / self.tried).flip(0).cummax(0).values.flip(0)
            self.table = torch.cat([rates, rates.new_zeros(1)])
        return self.table[(scores * (BINS / FLOOR)).long().clamp_(0, BINS)]

    def observe(self, scores: torch.Tensor, accepted: torch.Tensor) -> None:
        """scores [n] of nodes that were verified, accepted [n] bool."""
        bins = (scores * (BINS / FLOOR)).long().clamp_(0, BINS - 1)
        # older observations fade, so that a change of subject is noticed within some hundred cycles
        fade = 0.998
        self.tried = self.tried * fade + torch.bincount(bins, minlength=BINS)
        self.kept = self.kept * fade + torch.bincount(bins, accepted.float(), minlength=BINS)
        self.tried.clamp_min_(1.0)
        self.table = None


class Plan:
    """One call's decisions. `costs(rows)` looks up the costs for that many rows."""

    def __init__(self, costs, acceptance: Acceptance) -> None:
        self.costs, self.acceptance = costs, acceptance
        self._rows = 0
        self.resting = 0  # plain cycles still to go before speculation is tried

    def begin(self, rows: int) -> bool:
        """A cycle of `rows` rows is about to start: draft in it?"""
        if rows != self._rows:
            self._rows, self.now = rows, self.costs(rows)
            self.node = self.now.per_node
            self.plain = rows / self.now.plain
            # tokens and milliseconds of recent speculation; begins as if it were a little better than plain
            self.gained, self.spent = 8 * 1.3 * self.plain, 8.0
            self.seen, self.resting = 0, 0
        if self.resting:
            self.resting -= 1
            return False
        self.passes: list[int] = []
        return True

    @property
    def rate(self) -> float:
        """Tokens per millisecond that speculation makes now."""
        return self.gained / self.spent

    @property
    def floor(self) -> float:
        """The chance of acceptance from which on a node is worth its cost."""
        return max(self.rate, self.plain) * self.node

    def beams(self, scores: torch.Tensor, most: int) -> int:
        """scores [b, P] of the last level: how many of the best to expand, 0 to stop drafting."""
        chances = self.acceptance.chances(scores.topk(min(most, scores.shape[1])).values)
        worth = (chances * self.next - self.floor).clamp_min_(0.0)  # of each beam's best child
        width = int((worth > 0).any(0).sum())
        if not width:
            return 0
        tokens = scores.shape[0] * width
        cost = self.now.of(self.now.head, tokens)
        if float(worth.sum()) <= max(self.rate, self.plain) * cost:
            return 0
        self.passes.append(tokens)
        return width

    # of accepted nodes, the share with an accepted child: what a further level may bring
    next: float = 0.75

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """scores [b, P] of candidates -> [b, P] bool, those worth verifying."""
        return self.acceptance.chances(scores) >= self.floor

    def observe(self, tree: DraftTree, verdict: Verdict, gained: int) -> None:
        """After a speculative cycle. gained: tokens of all rows."""
        nodes = tree.tokens >= 0
        nodes[:, 0] = False  # the root was decided before
        step = torch.arange(verdict.path.shape[1], device=nodes.device)
        taken = step <= verdict.num_accepted[:, None]
        accepted = torch.zeros_like(nodes).scatter(1, verdict.path, taken)
        scores = tree.scores
        self.acceptance.observe(scores[nodes], accepted[nodes])
        now, b = self.now, scores.shape[0]
        verified = b + int(nodes.sum())
        spent = now.of(now.target, verified)
        spent += sum(now.of(now.head, tokens) for tokens in self.passes)
        self.gained = 0.97 * self.gained + gained
        self.spent = 0.97 * self.spent + spent
        self.seen += 1
        if self.seen >= SETTLED and self.rate < self.plain:
            self.resting, self.seen = PAUSE, SETTLED - 6
            self.gained, self.spent = 8 * 1.1 * self.plain, 8.0

    def explain(self) -> dict:
        return {
            "rows": self._rows,
            "plain_tokens_per_ms": round(self.plain, 3),
            "speculative_tokens_per_ms": round(self.rate, 3),
            "ms_per_node": round(self.node, 4),
            "least_chance": round(self.floor, 3),
            "break_even_tau": round(self.break_even, 2),
        }

    @property
    def break_even(self) -> float:
        """Acceptance length at which the last speculative cycles would have been as fast as plain decoding."""
        return (
            self.spent / (1 - 0.97) ** -1 * self.plain / self._rows
            if math.isfinite(self.spent)
            else 0.0
        )
