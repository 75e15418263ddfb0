"""What a shipped problem is made from. Knows nothing of the file it ends up in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One problem. `answer` is the obvious implementation that makes the expected outputs;
    `solutions` are other implementations, so that running them checks the tests, and the tests
    check them.

    cases: arguments of `answer`, edge cases by hand. more(rng): one more case. show: arguments ->
    standard input, of a stdin problem; a call-based one has `starter` and takes the arguments as
    they are.
    """

    name: str
    difficulty: str
    tags: Sequence[str]
    skills: Sequence[str]
    question: str
    answer: Callable
    cases: Sequence[tuple]
    more: Callable[[random.Random], tuple]
    solutions: Sequence[str]
    show: Callable[..., str] | None = None
    starter: str = ""
    time_limit: str = "1 second"
    policy: str | None = None
    special: bool = False

    @property
    def call_based(self) -> bool:
        return self.show is None


def numbers(*rows: Sequence[int]) -> str:
    """Lines of numbers."""
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)
