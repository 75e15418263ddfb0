"""A table of outputs, right and wrong: what each comparison policy says of them."""

import math
from decimal import Decimal

import pytest

from inference.evaluation.comparators import POLICIES, accepts

ALL = "strict tokens float nocase unordered"
# expected, got, the policies that accept it. The first seven TACO's published checker gets wrong.
TEXT = [
    ("1\n0\n1\n0\n", "0\n1\n", ""),  # false accepts: order and number of lines forgotten
    ("1 2\n", "21\n", ""),
    ("c b a\n", "abc\n", ""),
    ("0.3333333333\n", "0.333333\n", "float"),  # false rejects
    ("10\n", "10.0\n", "float"),
    ("12\n34\n", "12 \n34\n", ALL),
    ("YES\n", "yes\n", "nocase"),
    # white space
    ("1 2", "1 \t2\n\n\n", ALL),
    ("10\r\n20\r\n", "10\n20\n", ALL),
    ("10\n20\n", "10\r\n20\r\n", ALL),
    ("10\n20\n", "10 20\n", "tokens"),
    ("ab\n\ncd\n", "ab\ncd\n\n", "tokens unordered"),
    ("", "\n \n", ALL),
    ("", "10", ""),
    ("ab cd", "ab\u00a0cd", ""),  # no-break space is no white space here
    # what is missing, too much, repeated, or in another order
    ("12\n", "12\n34\n", ""),
    ("12 34 34\n", "12 12 34\n", ""),
    ("12 34 56\n", "34 56 12\n", "unordered"),
    ("12 34\n56 78\n", "34 12\n56 78\n", ""),
    ("12 34\n56 78\n", "56 78\n12 34\n", "unordered"),
    ("12\n12\n34\n", "12\n34\n34\n", ""),
    ("1 2\n", "12\n", ""),
    # numbers
    ("10\n", "010\n", "float"),
    ("-0\n", "0\n", "float"),
    ("0.5\n", ".5\n", "float"),
    ("0.5\n", "5e-1\n", "float"),
    ("0.5\n", "0.5000010\n", "float"),
    ("0.5\n", "0.5000011\n", ""),
    ("1000000.0\n", "1000001.0\n", "float"),
    ("1000000.0\n", "1000001.1\n", ""),
    ("10\n", "9.9999999\n", "float"),
    ("10\n", "9.9999\n", ""),
    ("1000000007\n", "1000000008\n", ""),
    ("1000000007\n", "1000000008.0\n", ""),
    ("1000000007.0\n", "1000000008\n", "float"),
    ("0\n", "0.0000009\n", "float"),
    ("0\n", "-1e-5\n", ""),
    ("123456789012345678901234567890\n", "123456789012345678901234567891\n", ""),
    ("0.1 x\n", "0.10 x\n", "float"),
    ("1\n", "nan\n", ""),
    ("0.5\n", "inf\n", ""),
    ("inf\n", "123.5\n", ""),
    ("0.5\n", "1e999999999\n", ""),
    ("10\n", "1_0\n", ""),
    ("10.5\n", "0xA.8\n", ""),
    ("10.5\n", "\u0661\u0660.5\n", ""),  # Arabic digits
    # letters
    ("stra\u00dfe\n", "STRASSE\n", ""),
    ("\u00c4\n", "\u00e4\n", ""),
    ("\u00e4\u00f6\n", "\u00e4\u00f6\n", ALL),
    ("True\n", "1\n", ""),
]
VALUES = [
    (3, "3", ""),
    (10, 10.0, ALL),
    (True, 1, ALL),  # as the sites compare that these problems come from
    (False, None, ""),
    ([], [], ALL),
    ([1, 2], [2, 1], "unordered"),
    ([1, 2], [1, 2, 2], ""),
    ([1, 1, 2], [1, 2, 2], ""),
    ([[1, 2], [3]], [[3], [1, 2]], "unordered"),
    ([[1, 2], [3]], [[2, 1], [3]], ""),
    ([[1, 2]], [1, 2], ""),
    ([3, 4], 3, ""),
    ({"a": [1]}, {"a": [1]}, ALL),
    ({"a": 1}, {"a": 1, "b": 2}, ""),
    ("ab", ["a", "b"], ""),
    (["Ab", {"k": "X"}], ["ab", {"k": "x"}], "nocase"),
    ([0.3, {"x": 1.5}], [0.1 + 0.2, {"x": 1.5}], "float"),
    (1000000007, 1000000008.0, ""),
    (1000000.0, 1000000.9, "float"),
    (0.5, float("nan"), ""),
    (float("inf"), 1e308, ""),
    (float("inf"), float("inf"), ALL),
    ([math.nan], [1.0], ""),
    ([math.nan], [float("nan")], ALL),
    (10**4000, 10**4000 + 1, ""),
    (10**4000, 1e300, ""),
    # very long integers arrive as Decimals
    (10**5000, Decimal("1" + "0" * 5000), ALL),
    (10**5000, Decimal("1" + "0" * 4999 + "1"), ""),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tables(policy):
    rows = [(e, g, accepts(policy, e, g.encode()), accepting) for e, g, accepting in TEXT]
    rows += [(e, g, accepts(policy, e, g), accepting) for e, g, accepting in VALUES]
    assert [row[:2] for row in rows if bool(row[2]) != (policy in row[3].split())] == []
    for got in (b"\xff\xfe", b"10\xff", b"\x00", b"10\x00", b"\xed\xa0\x80"):  # no text
        assert not accepts(policy, "10\n", got)
    deep = []
    for _ in range(900):
        deep = [deep]
    assert not accepts(policy, [1, [2, [3]]], deep)
