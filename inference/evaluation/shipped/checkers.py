"""Checkers of the shipped problems that have several right answers: (input, expected, got) -> bool.

Standard input is text, and `got` bytes.
"""

from __future__ import annotations


def pair_sum(given: str, expected: str, got: bytes) -> bool:
    """Any two different places whose numbers make the goal; -1 only where there are none."""
    goal, _, *values = map(int, given.split())
    try:
        places = [int(word) for word in got.split()]
    except ValueError:
        return False
    if expected.strip() == "-1" or len(places) != 2:
        return places == [-1] and expected.strip() == "-1"
    i, j = places
    return 1 <= i < j <= len(values) and values[i - 1] + values[j - 1] == goal


CHECKERS = {"pair-sum": pair_sum}
