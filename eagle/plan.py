"""tree="auto": which tree to draft in a cycle, or none: the one that promises most tokens a second.

What a cycle of each candidate costs is measured beforehand (costs.py). What it gains follows from a
running estimate of how often a draft is refused at each depth where all before it were accepted: a
candidate's own record where there is one, else that of the others, scaled by what wider trees
usually miss. Where plain decoding is best, speculation rests, and is tried again so seldom that
trying costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .tree import TreeShape

TREES = "3,1,1 4,2,1 6,3,2 8,4,2 12,4,3 16,4,4 24,5,5 40,6,7 60,7,10"
SHAPES = [TreeShape.parse(text) for text in TREES.split()]
# what each misses at a depth, beside what a chain misses there
MISSES = np.array([[1.0, 1.0, 0.9, 0.85, 0.7, 0.65, 0.6, 0.55, 0.5]]).T
WIDEST = SHAPES[-1]  # room for any candidate
LEVELS = np.array([shape.levels for shape in SHAPES])
WITHIN = np.arange(WIDEST.levels) < LEVELS[:, None]  # [candidates, depth]
HOPE = 0.2  # what a chain is taken to miss before anything is seen: promises are found out
DOUBT = 24.0  # cycles of a row that an expectation weighs against what is seen
WINDOW = 600.0  # cycles of a row that are remembered
AGAIN = 16  # cycles between two looks at a neighbour of the best candidate
TRIAL = 6  # cycles of a try after a rest
PAUSE = 96  # plain cycles, at least, before speculation is tried again
LOSS = 0.01  # of the time that tries may lose: the pause after a dear one is longer
GAIN = 1.03  # over plain decoding, below which speculation rests: prompts cost it more

Costs = dict[str, float]  # milliseconds of a cycle for one number of rows: "plain", and by tree


def size_of(rows: int) -> int:
    """Numbers of rows that share costs: rounded up to 1, 2, 3, 4, 6, 8, 12, 16, …"""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 2 and rows <= power * 3 // 4 else power


class Experience:
    """What calls of one kind teach those that follow: [candidate, depth] how often a draft token
    was judged (`seen`) and refused (`missed`), fading; by rows, how long a rest has to go."""

    def __init__(self) -> None:
        self.seen, self.missed = np.zeros((2, len(SHAPES), WIDEST.levels))
        self.resting: dict[int, int] = {}

    def learn(self, place: int, accepted: list[int]) -> None:
        """accepted: draft tokens kept of each row in a cycle of that candidate."""
        self.fade(max(0.5, 1 - len(accepted) / WINDOW))
        for kept in accepted:
            self.seen[place, : kept + 1] += WITHIN[place, : kept + 1]
            if kept < LEVELS[place]:
                self.missed[place, kept] += 1

    def fade(self, share: float) -> None:
        self.seen *= share
        self.missed *= share

    def tokens(self) -> np.ndarray:
        """[candidates] what a row may be expected to gain in a cycle."""
        chain = self.missed.sum(0) + DOUBT * HOPE
        chain = chain / ((MISSES * self.seen).sum(0) + DOUBT)  # [depth]
        missed = (self.missed + DOUBT * MISSES * chain) / (self.seen + DOUBT)
        reached = np.cumprod(1 - missed.clip(0, 1), axis=1)
        return 1 + (reached * WITHIN).sum(1)


class Plan:
    """One call's decisions. `costs(rows)`: the costs for that many rows. A cycle is `begin`,
    which says what to draft, and `end`, which hears what came of it."""

    def __init__(self, costs: Callable[[int], Costs], experience: Experience) -> None:
        self.costs, self.learnt = costs, experience
        self.rows = self.size = self.cycles = self.left = 0
        self.lost = 0.0  # milliseconds, by this try

    def _meet(self, rows: int) -> None:
        self.rows = rows
        if size_of(rows) == self.size:
            return
        self.size = size_of(rows)
        found = self.costs(self.size)
        self.plain = found["plain"]
        self.ms = np.array([found.get(str(shape), np.inf) for shape in SHAPES])
        self.left, self.lost = TRIAL, 0.0
        if self.size not in self.learnt.resting:
            known = self.learnt.seen[:, 0].sum() >= TRIAL
            self.learnt.resting[self.size] = PAUSE if known and not self._pays() else 0

    def _best(self) -> int:
        return int((self.learnt.tokens() / self.ms).argmax())

    def _pays(self) -> bool:
        return (self.learnt.tokens() / self.ms).max() * self.plain > GAIN

    def rests(self, rows: int) -> bool:
        """Will decoding be plain for a while, with that many rows?"""
        self._meet(rows)
        return self.learnt.resting[self.size] > 1

    def begin(self, rows: int) -> TreeShape | None:
        """A cycle is about to start: the tree to draft, None for plain decoding."""
        self._meet(rows)
        resting = self.learnt.resting
        if resting[self.size]:
            resting[self.size] -= 1
            if not resting[self.size]:
                self.left, self.lost = TRIAL, 0.0
                self.learnt.fade(0.5)  # the text may have become another
            return None
        self.place = self._best()
        self.cycles += 1
        if self.cycles % AGAIN == 0:
            near = self.place + (1 if self.cycles // AGAIN % 2 else -1)
            if 0 <= near < len(SHAPES) and np.isfinite(self.ms[near]):
                self.place = near
        return SHAPES[self.place]

    def end(self, accepted: list[int]) -> None:
        """The cycle drafted, and so many draft tokens were kept of each row."""
        if not accepted:
            return
        self.learnt.learn(self.place, accepted)
        gained = 1 + sum(accepted) / len(accepted)
        self.lost += self.ms[self.place] - gained * self.plain
        self.left = max(self.left - 1, 0)
        if not self.left and not self._pays():
            pause = max(PAUSE, int(self.lost / self.plain / LOSS))
            self.learnt.resting[self.size] = pause

    def explain(self) -> str:
        if not self.rows:
            return "nothing has been planned yet"
        tokens, best = self.learnt.tokens(), self._best()
        rests = self.learnt.resting[self.size]
        state = "plain decoding: speculation loses" if rests else f"drafting {SHAPES[best]}"
        lines = [
            f"{self.rows} rows, {state}",
            f"plain cycle {self.plain:.2f} ms; the best tree ({SHAPES[best]}) pays from tau "
            f"{self.ms[best] / self.plain:.2f} on, and is expected to make {tokens[best]:.2f}",
        ]
        facts = zip(SHAPES, self.ms, tokens, self.learnt.seen[:, 0], strict=True)
        for shape, ms, gain, seen in facts:
            if np.isfinite(ms):
                rate = f"{gain:.2f} tokens a row, {gain / ms:.3f} tokens/ms"
                lines.append(f"  {shape}: {ms:.2f} ms, {rate} ({seen:.0f} cycles of a row seen)")
        return "\n".join(lines)
