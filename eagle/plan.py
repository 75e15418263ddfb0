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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .tree import DraftTree, TreeShape
from .verify import Verdict

# the bounds within which a plan moves: draft passes, beams, nodes a row
WIDEST = TreeShape(total_token=48, depth=10, top_k=4)
BINS = 24  # of the draft's log-probability, down to FLOOR
FLOOR = -6.0
SETTLED = 24  # cycles before a rate is believed
TRIAL = 6  # cycles of another try, once acceptance has been observed
PAUSE = 96  # plain cycles, at least, before speculation is tried again
LOSS = 0.02  # of the time that a try may lose: the pause after a dear one is longer
HELD = 8.0  # plain cycles of time that the rate begins with
MEMORY = 0.97  # of the rate, from cycle to cycle
NEXT = 0.75  # the chance of a beam's best child, given the beam


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


class Acceptance:
    """How often nodes of a given draft probability were accepted, their ancestors included. The head's own
    probability is the prior, with the weight of a few observations."""

    def __init__(self) -> None:
        self.prior = 4.0 * np.exp((np.arange(BINS) + 0.5) / BINS * FLOOR)
        self.tried, self.kept = np.full(BINS, 4.0), self.prior.copy()
        self._refresh()

    def _refresh(self) -> None:
        # never higher for a lower score, so that a parent is at least as likely as its child: bins that are
        # out of order are pooled, each with the weight of its observations
        blocks: list[tuple[float, float, int]] = []
        for kept, tried in zip(self.kept.tolist(), self.tried.tolist(), strict=True):
            size = 1
            while blocks and kept * blocks[-1][1] > blocks[-1][0] * tried:
                more = blocks.pop()
                kept, tried, size = kept + more[0], tried + more[1], size + more[2]
            blocks.append((kept, tried, size))
        rates = np.repeat([k / t for k, t, _ in blocks], [n for _, _, n in blocks])
        self.table = np.append(rates, 0.0)

    def bins(self, scores: np.ndarray) -> np.ndarray:
        scores = np.nan_to_num(scores, nan=-np.inf)  # of a broken head: never worth it
        return (np.clip(scores / FLOOR, 0.0, 1.0) * BINS).astype(np.int64)

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """scores: cumulative log-probabilities -> chances of acceptance, of the same shape."""
        return self.table[self.bins(scores)]

    def observe(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """scores [n] of nodes that were verified, accepted [n] bool."""
        bins = self.bins(scores)
        # older observations fade, so that a change of subject is noticed within some hundred cycles; what is
        # left is the prior, or a score that is not tried any more could never be tried again
        fade = 0.998
        self.tried = 4.0 + (self.tried - 4.0) * fade
        self.kept = self.prior + (self.kept - self.prior) * fade
        self.tried += np.bincount(bins, minlength=BINS + 1)[:BINS]
        self.kept += np.bincount(bins, accepted, minlength=BINS + 1)[:BINS]
        self._refresh()


class Plan:
    """One call's decisions. `costs(rows)` looks up the costs for that many rows.

    The decisions are the host's, in numpy: a few numbers a cycle, for which tensors would be slower.
    """

    def __init__(self, costs: Callable[[int], Costs], acceptance: Acceptance) -> None:
        self.costs, self.acceptance = costs, acceptance
        self.rows = 0
        self.resting = 0  # plain cycles to go before speculation is tried again
        self.urgency: np.ndarray | None = None

    def begin(self, urgency: Sequence[float]) -> bool:
        """A cycle is about to start: draft in it? urgency: for each row, how much its tokens are wanted, 1 on
        the whole; a row that has far to go holds up its batch."""
        rows = len(urgency)
        if rows != self.rows:
            self.rows, self.now = rows, self.costs(rows)
            self.node = self.now.per_node
            self.plain = rows / self.now.plain
            self.resting = 0
            self._try(SETTLED, 1.3)
        if self.resting:
            self.resting -= 1
            return False
        self.urgency = np.asarray(urgency)[:, None]
        self.passes: list[int] = []
        return True

    def _try(self, trial: int, hope: float) -> None:
        """Speculate for `trial` cycles at least, beginning as if it were `hope` times as fast as plain."""
        self.trial, self.seen, self.lost = trial, 0, 0.0
        # tokens, milliseconds and cycles of recent speculation
        self.gained, self.spent, self.held = HELD * hope * self.rows, HELD * self.now.plain, HELD

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
        best = np.sort(scores.numpy(force=True))[:, : -most - 1 : -1]
        chances = self.acceptance.chances(best) * self.urgency * NEXT
        worth = np.maximum(chances - self.floor, 0.0)  # of each beam's best child
        width = int((worth > 0).any(0).sum())
        tokens = len(best) * width
        if not width or worth.sum() <= max(self.rate, self.plain) * self.now.of(
            self.now.head, tokens
        ):
            return 0
        self.passes.append(tokens)
        return width

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """scores [b, P] of candidates -> [b, P] bool, those worth verifying."""
        chances = self.acceptance.chances(scores.numpy(force=True)) * self.urgency
        return torch.from_numpy(chances >= self.floor).to(scores.device)

    def observe(self, tree: DraftTree, verdict: Verdict, gained: int) -> None:
        """After a speculative cycle. gained: tokens of all rows."""
        tokens, path, kept = (
            x.numpy(force=True) for x in (tree.tokens, verdict.path, verdict.num_accepted)
        )
        nodes = tokens >= 0
        nodes[:, 0] = False  # the root was decided before
        accepted = np.zeros_like(nodes)
        step = np.arange(path.shape[1]) <= kept[:, None]
        row = np.broadcast_to(np.arange(len(path))[:, None], path.shape)
        accepted[row[step], path[step]] = True
        self.acceptance.observe(tree.scores.numpy(force=True)[nodes], accepted[nodes])
        now = self.now
        verified = len(tokens) + int(nodes.sum())
        spent = now.of(now.target, verified) + sum(now.of(now.head, n) for n in self.passes)
        self.gained = MEMORY * self.gained + gained
        self.spent = MEMORY * self.spent + spent
        self.held = MEMORY * self.held + 1
        self.seen += 1
        self.lost += spent - gained / self.plain
        if self.seen >= self.trial and self.rate < self.plain:
            lost = TRIAL / self.seen * self.lost / now.plain  # by a try, in plain cycles
            self.resting = max(PAUSE, int(lost / LOSS))
            self.last = self.rate, self.spent / self.held
            self._try(TRIAL, 1.1)

    def explain(self) -> str:
        if not self.rows:
            return "nothing has been planned yet"
        now, cycles = self.now, ", ".join
        # while it rests, the rate that speculation had is not the one it begins again with
        rate, per_cycle = self.last if self.resting else (self.rate, self.spent / self.held)
        state = "plain decoding: speculation loses" if self.resting else "speculating"
        return "\n".join([
            f"{self.rows} rows, {state}",
            f"plain cycle {now.plain:.2f} ms: {self.plain:.3f} tokens/ms",
            "speculative cycle without its draft passes, by tokens verified: "
            + cycles(f"{n}: {ms:.2f} ms" for n, ms in sorted(now.target.items())),
            "draft pass, by beams: " + cycles(f"{n}: {ms:.2f} ms" for n, ms in sorted(now.head.items())),
            f"recent speculation: {rate:.3f} tokens/ms; break-even tau about "
            f"{per_cycle * self.plain / self.rows:.2f} at its {per_cycle:.2f} ms a cycle",
            f"one more node costs {self.node:.3f} ms, so it must have a chance of {self.floor:.3f} at least",
        ])  # fmt: skip
