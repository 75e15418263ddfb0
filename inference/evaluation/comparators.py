"""Is this output the expected one? `accepts(policy, expected, got)`: `got` is the bytes that a
program printed, `expected` then text; or both are plain JSON values. `expected` is trusted, `got`
is whatever a program made. White space is ASCII's, numbers are decimal literals.

* `strict`: the same lines of the same tokens. White space between tokens and at the ends of lines
  does not count, nor do empty lines at the start and the end; everything else does.
* `tokens`: as `strict`, but a line break is white space like any other.
* `float`: as `strict`, but a number may differ from the expected one by 1e-6, absolute or relative;
  from an expected integer only absolute, and by nothing if it is written as an integer itself. So
  10.0 and 9.9999999 are 10, and neither 1000000008 nor 1000000008.0 is 1000000007.
* `nocase`: as `strict`, but A-Z and a-z are the same.
* `unordered`, for problems that say so: the lines in any order, each as often; if one line is
  expected, its tokens in any order. Of a value, the items of the outermost list.

Values are the same as Python's == says (1 == 1.0 == True), and NaN is NaN; all but `unordered`
reach into lists and dicts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

TOLERANCE = Decimal("1e-6")
NUMBER = re.compile(rb"([+-]?\d+)|[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")


def equal(expected: Any, got: Any) -> bool:
    return expected == got or (expected != expected and got != got)


def close(expected: Any, got: Any) -> bool:
    numbers = number(expected), number(got)
    if None in numbers:
        return equal(expected, got)
    (wanted, whole), (given, written_whole) = numbers
    if whole and written_whole:
        return wanted == given
    scale = Decimal(1) if whole else max(Decimal(1), abs(wanted))
    return abs(wanted - given) <= TOLERANCE * scale


def number(item: Any) -> tuple[Decimal, bool] | None:
    """The value of a token or of a number, and whether it is written as an integer."""
    if isinstance(item, bytes):
        match = NUMBER.fullmatch(item)
        return match and (Decimal(item.decode()), match[1] is not None)
    plain = isinstance(item, (int, float, Decimal)) and not isinstance(item, bool)
    if not plain or (isinstance(item, float) and not math.isfinite(item)):
        return None
    return Decimal(item), not isinstance(item, float)


def nocase(expected: Any, got: Any) -> bool:
    if isinstance(expected, str) and isinstance(got, str):
        expected, got = encoded(expected), encoded(got)
    if isinstance(expected, bytes) and isinstance(got, bytes):
        return expected.lower() == got.lower()
    return equal(expected, got)


# of the leaves: a token or a plain value
POLICIES = {"strict": equal, "tokens": equal, "float": close, "nocase": nocase, "unordered": equal}


def accepts(policy: str, expected: Any, got: Any) -> bool:
    if isinstance(got, bytes):
        expected = encoded(expected)
        if policy == "tokens":
            return expected.split() == got.split()
        expected, got = lines(expected), lines(got)
        if policy == "unordered":
            expected, got = ([line for line in text if line] for text in (expected, got))
            if len(expected) == len(got) == 1:
                expected, got = expected[0], got[0]
    if policy == "unordered" and isinstance(expected, list) and isinstance(got, list):
        return Counter(map(hashable, expected)) == Counter(map(hashable, got))
    return expected == got or same(expected, got, POLICIES[policy])


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def lines(text: bytes) -> list[list[bytes]]:
    """Tokens of each line, without the empty lines at both ends."""
    return [line.split() for line in text.strip().split(b"\n")]


def same(expected: Any, got: Any, leaf: Callable[[Any, Any], bool]) -> bool:
    """Lists and dicts of the same shape whose leaves are the same; as deep as `expected`."""
    if isinstance(expected, list) and isinstance(got, list):
        pairs = zip(expected, got, strict=False)
        return len(expected) == len(got) and all(same(a, b, leaf) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = expected.keys()
        return keys == got.keys() and all(same(expected[k], got[k], leaf) for k in keys)
    return not isinstance(expected, (list, dict)) and leaf(expected, got)


def hashable(value: Any) -> Any:
    """Equal for values that are the same, and for no others."""
    if isinstance(value, list):
        return ("list", *map(hashable, value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, hashable(item)) for key, item in value.items()))
    return ("nan",) if value != value else value
