"""A table of outputs, right and wrong: what each comparison policy says of them."""

import math
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from inference.evaluation.comparators import POLICIES, accepts

ALL = "strict tokens float nocase unordered"
TABLES = yaml.safe_load((Path(__file__).parents[2] / "data/comparators.yaml").read_text("utf-8"))
VALUES = [
    *TABLES["values"],
    ([math.nan], [float("nan")], ALL),
    (10**4000, 10**4000 + 1, ""),
    (10**4000, 1e300, ""),
    # very long integers arrive as Decimals
    (10**5000, Decimal("1" + "0" * 5000), ALL),
    (10**5000, Decimal("1" + "0" * 4999 + "1"), ""),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tables(policy):
    rows = [(e, g, accepts(policy, e, g.encode()), accepting) for e, g, accepting in TABLES["text"]]
    rows += [(e, g, accepts(policy, e, g), accepting) for e, g, accepting in VALUES]
    assert [row[:2] for row in rows if bool(row[2]) != (policy in row[3].split())] == []
    for got in (b"\xff\xfe", b"10\xff", b"\x00", b"10\x00", b"\xed\xa0\x80"):  # no text
        assert not accepts(policy, "10\n", got)
    deep = []
    for _ in range(900):
        deep = [deep]
    assert not accepts(policy, [1, [2, [3]]], deep)
