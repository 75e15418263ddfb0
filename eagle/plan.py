"""tree="auto": which tree to draft, or none, by the tokens per second that each is seen to make.

Knows shapes, milliseconds and tokens; knows nothing of models, caches or what the tokens are.

The choice is among the rungs of a ladder: plain decoding, short chains, wider and deeper trees.
What a rung makes is first estimated, from the measured costs of this machine and a typical head's
acceptance, and then seen. Each cycle takes the rung that promises most; now and then a neighbour is
looked at again. Where plain decoding is best, speculation rests, and is tried again so seldom that
trying costs next to nothing.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .tree import TreeShape

# tree, and tokens a cycle of a good head: where estimates begin. They had better be high, as what
# promises too much is tried and found out, and what promises too little is not
LADDER: tuple[tuple[TreeShape | None, float], ...] = (
    (None, 1.0),
    (TreeShape(3, 1, 1), 2.4),
    (TreeShape(4, 2, 1), 3.0),
    (TreeShape(6, 3, 2), 3.4),
    (TreeShape(8, 4, 2), 3.9),
    (TreeShape(12, 4, 3), 4.3),
    (TreeShape(16, 4, 4), 4.5),
    (TreeShape(24, 5, 5), 4.9),
    (TreeShape(40, 6, 7), 5.3),
    (TreeShape(60, 7, 10), 5.7),
)
WIDEST = TreeShape(60, 7, 10)  # room for any rung
PLAIN = 0  # its place on the ladder
DOUBT = 24.0  # cycles of a row that an estimate weighs against what is seen
WINDOW = 600.0  # cycles of a row that are remembered
AGAIN = 16  # cycles between two looks at a neighbouring rung; each eighth look is at plain decoding
TRIAL = 6  # cycles of a try after a rest
PAUSE = 96  # plain cycles, at least, before speculation is tried again
LOSS = 0.01  # of the time that tries may lose: the pause after a dear one is longer
GAIN = 1.03  # over plain decoding, below which speculation rests: prompts cost it more


@dataclass(frozen=True)
class Costs:
    """Milliseconds, measured for one number of rows. `target`: a speculative cycle without its
    draft passes, by tokens verified; `head`: a draft pass, by beams of all rows; `plain`: a plain
    cycle."""

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

    def cycle(self, shape: TreeShape | None, rows: int) -> float:
        """Of a whole cycle that drafts `shape`; None is plain."""
        if shape is None:
            return self.plain
        passes = shape.depth * self.of(self.head, rows * shape.top_k)
        return self.of(self.target, rows * shape.num_nodes) + passes


def size_of(rows: int) -> int:
    """Numbers of rows that share costs and a pace: rounded up to 1, 2, 3, 4, 6, 8, 12, 16, …"""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 2 and rows <= power * 3 // 4 else power


@dataclass
class Rung:
    """What is known of one shape with one number of rows: tokens a row gains in a cycle,
    milliseconds of a cycle, and how many cycles of a row stand behind both."""

    tokens: float
    ms: float
    seen: float = 0.0

    def see(self, tokens: float, ms: float, rows: int) -> float:
        """A cycle in which each of `rows` rows gained `tokens` on average and that took `ms`.
        Returns the
        milliseconds that count: what else the machine did counts no more than the cycle itself."""
        ms = min(ms, 2 * self.ms)
        share = rows / (min(self.seen, WINDOW) + DOUBT + rows)
        self.tokens += share * (tokens - self.tokens)
        share = max(share, 1 / (2 + self.seen / rows))  # times scatter less than tokens
        self.ms += share * (ms - self.ms)
        self.seen += rows
        return ms

    @property
    def rate(self) -> float:
        """Tokens of a row per millisecond."""
        return self.tokens / self.ms


class Pace:
    """The ladder for one number of rows, and where on it decoding stands."""

    def __init__(self, costs: Costs, rows: int) -> None:
        self.rungs = [Rung(tokens, costs.cycle(shape, rows)) for shape, tokens in LADDER]
        self.guess = [(rung.tokens, rung.ms) for rung in self.rungs]
        self.resting = 0  # plain cycles to go before speculation is tried again
        self.trying = 0  # cycles to go of a try
        self.lost = 0.0  # milliseconds, by this try
        self.cycles = 0

    def estimate(self, place: int) -> tuple[float, float]:
        """Tokens and milliseconds of a rung: what was seen of it, and where nothing was, its guess
        corrected by what came of the nearest rung's."""
        rung = self.rungs[place]
        known = [i for i, r in enumerate(self.rungs) if r.seen and i != PLAIN]
        if rung.seen or place == PLAIN or not known:
            return rung.tokens, rung.ms
        near = min(known, key=lambda i: abs(i - place))
        tokens, ms = self.guess[near]
        # a head is better or worse in what its drafts add to the one token that is sure
        better = (self.rungs[near].tokens - 1) / (tokens - 1)
        slower = self.rungs[near].ms / ms
        return 1 + better * (rung.tokens - 1), slower * rung.ms

    def expect(self, place: int) -> float:
        """The rate of a rung, as far as is known."""
        tokens, ms = self.estimate(place)
        return tokens / ms

    def best(self) -> int:
        """The speculative rung that promises most."""
        return max(range(1, len(self.rungs)), key=self.expect)


@dataclass
class Experience:
    """What calls of one kind have taught, for those that follow: paces by `size_of`."""

    paces: dict[int, Pace] = field(default_factory=dict)


class Plan:
    """One call's decisions. `costs(rows)` looks up the costs for that many rows.

    A cycle is `begin`, which says what to draft, and `end`, which hears what came of it.
    """

    clock = staticmethod(time.perf_counter)  # None: cycles take what the costs say

    def __init__(self, costs: Callable[[int], Costs], experience: Experience) -> None:
        self.costs, self.experience = costs, experience
        self.rows = self.size = 0
        self.idle = 0  # plain cycles since the head was last asked

    def _meet(self, rows: int) -> None:
        self.rows = rows
        if size_of(rows) != self.size:
            self.size = size_of(rows)
            self.now = self.costs(self.size)
            paces = self.experience.paces
            self.pace = paces.get(self.size)
            if self.pace is None:
                self.pace = Pace(self.now, self.size)
                fewer = [n for n in paces if n < self.size]
                if fewer and paces[max(fewer)].resting:  # more rows gain less
                    self.pace.resting = PAUSE
                paces[self.size] = self.pace

    def rests(self, rows: int) -> bool:
        """Will decoding be plain for a while, with that many rows?"""
        self._meet(rows)
        return self.pace.resting > 1

    def begin(self, rows: int) -> TreeShape | None:
        """A cycle is about to start: the tree to draft, None for plain decoding."""
        self._meet(rows)
        pace = self.pace
        pace.cycles += 1
        self.place = self._choose(pace)
        self.started = self.clock() if self.clock else 0.0
        return LADDER[self.place][0]

    def _choose(self, pace: Pace) -> int:
        if pace.resting:
            pace.resting -= 1
            if not pace.resting:
                pace.trying, pace.lost = TRIAL, 0.0
            return PLAIN
        if not pace.rungs[PLAIN].seen:
            return PLAIN
        best = pace.best()
        turn = pace.cycles // AGAIN % 8
        near = min(max(best + 1 if turn % 2 else best - 1, 1), len(LADDER) - 1)
        if pace.trying:
            return best if pace.trying > TRIAL // 3 else near
        if pace.cycles % AGAIN < 2:  # two in a row: the first after another is slower
            return PLAIN if turn == 0 else near
        return best

    def end(self, gained: int) -> None:
        """The cycle is done; its rows gained so many tokens in all."""
        pace, rows = self.pace, self.rows
        rung, plain = pace.rungs[self.place], pace.rungs[PLAIN]
        ms = (
            1e3 * (self.clock() - self.started)
            if self.clock
            else self.now.cycle(LADDER[self.place][0], self.size)
        )
        if self.place == PLAIN:
            rung.see(1.0, ms, rows)
            self.idle += 1
            return
        if (
            self.idle < 2
        ):  # else the head's pass over what a rest left undone tells nothing of other cycles
            if not rung.seen:
                rung.tokens, rung.ms = pace.estimate(self.place)
            ms = rung.see(gained / rows, ms, rows)
        self.idle = 0
        pace.lost += ms - gained / rows / plain.rate
        pace.trying = max(pace.trying - 1, 0)
        best = pace.rungs[pace.best()]
        # not before the best is known, or it would be given up for a bad start
        if not pace.trying and best.seen >= TRIAL and best.rate < GAIN * plain.rate:
            pace.resting = max(PAUSE, int(pace.lost / plain.ms / LOSS))

    def explain(self) -> str:
        if not self.rows:
            return "nothing has been planned yet"
        pace, plain = self.pace, self.pace.rungs[PLAIN]
        place = pace.best()
        best, shape = pace.rungs[place], LADDER[place][0]
        now, cycles = self.now, ", ".join
        state = "plain decoding: speculation loses" if pace.resting else f"drafting {shape}"
        seen = (
            f"{shape}: {rung.tokens:.2f} tokens in {rung.ms:.2f} ms"
            for (shape, _), rung in zip(LADDER[1:], pace.rungs[1:], strict=True)
            if rung.seen
        )
        return "\n".join(
            [
                f"{self.rows} rows, {state}",
                f"plain cycle {plain.ms:.2f} ms; a cycle of the best tree ({shape}) {best.ms:.2f} ms: it pays from "
                f"tau {best.ms / plain.ms:.2f} on, and makes {best.tokens:.2f}",
                "a row's cycles seen: " + (cycles(seen) or "none yet"),
                "measured before: plain cycle "
                + f"{now.plain:.2f} ms; speculative cycle without its draft passes, "
                "by tokens verified, "
                + cycles(f"{n}: {ms:.2f} ms" for n, ms in sorted(now.target.items()))
                + "; draft pass, by beams, "
                + cycles(f"{n}: {ms:.2f} ms" for n, ms in sorted(now.head.items())),
            ]
        )
