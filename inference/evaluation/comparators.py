"""Is this output the expected one? Comparison policies for printed text and for returned values.

Each is a pair of functions: `text(expected: str, got: bytes) -> bool` for standard output, and
`value(expected, got) -> bool` for plain JSON values. `expected` is trusted, `got` is whatever a
program made. White space is ASCII's, numbers are decimal literals.

* `strict`: the same lines of the same tokens. White space between tokens and at the ends of lines
  does not count, nor do empty lines at the start and the end; everything else does.
* `tokens`: as `strict`, but a line break is white space like any other.
* `float`: as `strict`, but a number may differ from the expected one by 1e-6, absolute or relative;
  from an expected integer only absolute, and by nothing if it is written as an integer itself. So
  10.0 and 9.9999999 are 10, and neither 1000000008 nor 1000000008.0 is 1000000007.
* `nocase`: as `strict`, but A-Z and a-z are the same.
* `unordered`, for problems that say so: the lines in any order, each as often; if one line is
  expected, its tokens in any order.

Values: `strict` and `tokens` compare as Python's == does (1 == 1.0 == True), and NaN equals itself;
`float` and `nocase` reach into lists and dicts; `unordered` forgets the order of the outermost
list.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

TOLERANCE = Decimal("1e-6")
_NUMBER = re.compile(rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")
_INTEGER = re.compile(rb"[+-]?\d+")


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def rows(text: bytes) -> list[list[bytes]]:
    """Tokens of each line, without the empty lines at both ends."""
    lines = [line.split() for line in text.strip().split(b"\n")]
    return lines if lines != [[]] else []


def close(expected: Decimal, got: Decimal, whole: bool, written_whole: bool) -> bool:
    """`whole`: an integer is expected; `written_whole`: and one was given."""
    if whole and written_whole:
        return expected == got
    scale = Decimal(1) if whole else max(Decimal(1), abs(expected))
    return abs(expected - got) <= TOLERANCE * scale


def close_tokens(expected: bytes, got: bytes) -> bool:
    if expected == got:
        return True
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(got)):
        return False
    whole, written_whole = (_INTEGER.fullmatch(token) is not None for token in (expected, got))
    return close(Decimal(expected.decode()), Decimal(got.decode()), whole, written_whole)


def nocase_tokens(expected: bytes, got: bytes) -> bool:
    return expected.lower() == got.lower()


def same_leaf(expected: Any, got: Any) -> bool:
    return expected == got or (expected != expected and got != got)


def close_leaf(expected: Any, got: Any) -> bool:
    for value in (expected, got):
        number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
        if not number or not (isinstance(value, int | Decimal) or math.isfinite(value)):
            return same_leaf(expected, got)
    whole, written_whole = (not isinstance(value, float) for value in (expected, got))
    return close(Decimal(expected), Decimal(got), whole, written_whole)


def nocase_leaf(expected: Any, got: Any) -> bool:
    if isinstance(expected, str) and isinstance(got, str):
        return nocase_tokens(encoded(expected), encoded(got))
    return same_leaf(expected, got)


def same_text(expected: str, got: bytes, same: Callable[[bytes, bytes], bool]) -> bool:
    wanted, given = rows(encoded(expected)), rows(got)
    return len(wanted) == len(given) and all(
        len(a) == len(b) and all(map(same, a, b)) for a, b in zip(wanted, given, strict=True)
    )


def tokens_text(expected: str, got: bytes) -> bool:
    return encoded(expected).split() == got.split()


def unordered_text(expected: str, got: bytes) -> bool:
    wanted, given = ([tuple(row) for row in rows(t) if row] for t in (encoded(expected), got))
    if len(wanted) == len(given) == 1:
        wanted, given = wanted[0], given[0]
    return Counter(wanted) == Counter(given)


def same_value(expected: Any, got: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Lists and dicts of the same shape whose leaves are the same; as deep as `expected`."""
    if isinstance(expected, list) and isinstance(got, list):
        pairs = zip(expected, got, strict=False)
        return len(expected) == len(got) and all(same_value(a, b, same) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = expected.keys()
        return keys == got.keys() and all(same_value(expected[k], got[k], same) for k in keys)
    if isinstance(expected, (list, dict)) or isinstance(got, (list, dict)):
        return False
    return same(expected, got)


def unordered_value(expected: Any, got: Any) -> bool:
    if isinstance(expected, list) and isinstance(got, list):
        return Counter(map(_hashable, expected)) == Counter(map(_hashable, got))
    return same_value(expected, got, same_leaf)


def _hashable(value: Any) -> Any:
    """Equal for values that are the same, and for no others."""
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, _hashable(item)) for key, item in value.items()))
    return ("nan",) if value != value else value


# name: (for standard output, for returned values)
POLICIES: dict[str, tuple[Callable[[str, bytes], bool], Callable[[Any, Any], bool]]] = {
    "strict": (partial(same_text, same=bytes.__eq__), partial(same_value, same=same_leaf)),
    "tokens": (tokens_text, partial(same_value, same=same_leaf)),
    "float": (partial(same_text, same=close_tokens), partial(same_value, same=close_leaf)),
    "nocase": (partial(same_text, same=nocase_tokens), partial(same_value, same=nocase_leaf)),
    "unordered": (unordered_text, unordered_value),
}
