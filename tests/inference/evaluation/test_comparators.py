"""A table of outputs, right and wrong: what each comparison policy says of them."""

import math
from decimal import Decimal

import pytest

from inference.evaluation.comparators import POLICIES

# expected, got, the policies that accept it. The first seven TACO's published checker gets wrong.
TEXT = [
    ("1\n0\n1\n0\n", "0\n1\n", ""),  # false accepts: order and number of lines forgotten
    ("1 2\n", "21\n", ""),
    ("c b a\n", "abc\n", ""),
    ("0.3333333333\n", "0.333333\n", "float"),  # false rejects
    ("10\n", "10.0\n", "float"),
    ("12\n34\n", "12 \n34\n", "strict tokens float nocase unordered"),
    ("YES\n", "yes\n", "nocase"),
    # white space
    ("1 2\n3\n", "1 2\n3\n", "strict tokens float nocase unordered"),
    ("1 2", "1 2\n\n\n", "strict tokens float nocase unordered"),
    ("10 20\n", "10  20\n", "strict tokens float nocase unordered"),
    ("10 20\n", "10\t20\n", "strict tokens float nocase unordered"),
    ("10\r\n20\r\n", "10\n20\n", "strict tokens float nocase unordered"),
    ("10\n20\n", "10\r\n20\r\n", "strict tokens float nocase unordered"),
    ("10\n20\n", "10 20\n", "tokens"),
    ("10 20\n", "10\n20\n", "tokens"),
    ("ab\n\ncd\n", "ab\ncd\n", "tokens unordered"),
    ("ab\n\ncd\n", "ab\ncd\n\n", "tokens unordered"),
    ("", "", "strict tokens float nocase unordered"),
    ("", "\n \n", "strict tokens float nocase unordered"),
    ("", "10", ""),
    ("ab cd", "ab\u00a0cd", ""),  # no-break space is no white space here
    # what is missing, too much, repeated, or in another order
    ("12\n", "12\n34\n", ""),
    ("12 34 34\n", "12 12 34\n", ""),
    ("12\n34\n56\n", "34\n56\n12\n", "unordered"),
    ("12 34 56\n", "34 56 12\n", "unordered"),
    ("12 34\n56 78\n", "34 12\n56 78\n", ""),
    ("12 34\n56 78\n", "56 78\n12 34\n", "unordered"),
    ("12\n12\n34\n", "12\n34\n34\n", ""),
    ("12\n", "1 2\n", ""),
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
    ("1/2\n", "0.5\n", ""),
    # letters
    ("Yes No\n", "yes NO\n", "nocase"),
    ("stra\u00dfe\n", "STRASSE\n", ""),
    ("\u00c4\n", "\u00e4\n", ""),
    ("\u00e4\u00f6\n", "\u00e4\u00f6\n", "strict tokens float nocase unordered"),
    ("True\n", "1\n", ""),
    ('["a", "b"]\n', "['a', 'b']\n", ""),
]
ALL = "strict tokens float nocase unordered"
VALUES = [
    (3, 3, ALL),
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
    ([1, [2]], [1, 2], ""),
    ([[1, 2]], [1, 2], ""),
    ([3, 4], 3, ""),
    ({"a": [1]}, {"a": [1]}, ALL),
    ({"a": 1}, {"a": 1, "b": 2}, ""),
    ("ab", ["a", "b"], ""),
    ("Ab", "aB", "nocase"),
    (["Ab", {"k": "X"}], ["ab", {"k": "x"}], "nocase"),
    (0.3, 0.1 + 0.2, "float"),
    ([0.3, {"x": 1.5}], [0.30000001, {"x": 1.5}], "float"),
    (1000000007, 1000000008, ""),
    (1000000007, 1000000008.0, ""),
    (1000000.0, 1000000.9, "float"),
    (0.5, float("nan"), ""),
    (float("inf"), 1e308, ""),
    (float("inf"), float("inf"), ALL),
    (10**4000, 10**4000 + 1, ""),
    (10**4000, 1e300, ""),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tables(policy):
    text, value = POLICIES[policy]
    rows = [(e, g, text(e, g.encode()), accepting) for e, g, accepting in TEXT]
    rows += [(e, g, value(e, g), accepting) for e, g, accepting in VALUES]
    assert [row[:2] for row in rows if bool(row[2]) != (policy in row[3].split())] == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("got", [b"\xff\xfe", b"10\xff", b"\x00", b"10\x00", b"\xed\xa0\x80"])
def test_bytes_that_are_no_text_are_wrong(policy, got):
    assert POLICIES[policy][0]("10\n", got) is False


@pytest.mark.parametrize("policy", POLICIES)
def test_odd_values(policy):
    accepts = POLICIES[policy][1]
    assert not accepts([math.nan], [1.0])
    assert accepts([math.nan], [float("nan")])
    # very long integers arrive as Decimals
    assert accepts(10**5000, Decimal("1" + "0" * 5000))
    assert not accepts(10**5000, Decimal("1" + "0" * 4999 + "1"))
    deep = []
    for _ in range(900):
        deep = [deep]
    assert not accepts([1, [2, [3]]], deep)
