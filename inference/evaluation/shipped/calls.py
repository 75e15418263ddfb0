"""Problems that ask for a function."""

from __future__ import annotations

import functools
import itertools
import random
import statistics

from .source import Source


def rotate(values, k):
    for _ in range(k % len(values) if values else 0):
        values = [values[-1], *values[:-1]]
    return values


def to_roman(number):
    """One mark at a time, the largest that fits."""
    marks = {
        1000: "M",
        900: "CM",
        500: "D",
        400: "CD",
        100: "C",
        90: "XC",
        50: "L",
        40: "XL",
        10: "X",
        9: "IX",
        5: "V",
        4: "IV",
        1: "I",
    }
    text = ""
    while number:
        value = max(v for v in marks if v <= number)
        text, number = text + marks[value], number - value
    return text


def edit_distance(first, second):
    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        swap = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(swap, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(first), len(second))


def some_words(rng: random.Random) -> tuple[str, str]:
    first = "".join(rng.choice("abcd") for _ in range(rng.randint(1, 9)))
    second = list(first)
    for _ in range(rng.randint(1, 5)):
        place = rng.randint(0, len(second))
        second[place : place + rng.randint(0, 1)] = rng.choice(["", "a", "c", "dd"])
    return first, "".join(second)


def calculate(text):
    return eval(text)


def some_sum(rng: random.Random, depth: int = 3) -> str:
    if depth == 0 or rng.random() < 0.15:
        return str(rng.randint(0, 20))
    left, right = some_sum(rng, depth - 1), some_sum(rng, depth - 1)
    space = rng.choice(["", " "])
    text = f"{left}{space}{rng.choice('+-*')}{space}{right}"
    return f"({text})" if rng.random() < 0.4 else text


def queens(size):
    return sum(
        len({row + column for row, column in enumerate(columns)}) == size
        and len({row - column for row, column in enumerate(columns)}) == size
        for columns in itertools.permutations(range(size))
    )


def medians(values, width):
    windows = [values[i : i + width] for i in range(len(values) - width + 1)]
    return [float(statistics.median(window)) for window in windows]


def two_singles(values):
    return sorted(value for value in values if values.count(value) == 1)


def some_singles(rng: random.Random) -> tuple[list[int]]:
    found = rng.sample(range(200), rng.randint(2, 9))
    values = found[:2] + found[2:] * 2
    rng.shuffle(values)
    return (values,)


CALLS = (
    Source(
        name="rotate",
        difficulty="EASY",
        tags=["Implementation"],
        skills=[],
        question="""Return the list after k steps to the right. In one step every number moves one place on, and
the last one becomes the first. k may be larger than the list, and 0.
""",
        starter="def rotate(values, k):\n",
        answer=rotate,
        cases=[
            ([], 0),
            ([], 3),
            ([1], 5),
            ([1, 2], 0),
            ([1, 2], 1),
            ([1, 2, 3], 3),
            ([1, 2, 3], 4),
            ([5, 5, 6], 2),
            (list(range(10)), 23),
        ],
        more=lambda rng: (
            [rng.randint(0, 9) for _ in range(rng.randint(2, 12))],
            rng.randint(0, 30),
        ),
        solutions=[
            """def rotate(values, k):
    if not values:
        return values
    first = len(values) - k % len(values)
    return values[first:] + values[:first]
"""
        ],
    ),
    Source(
        name="to-roman",
        difficulty="MEDIUM",
        tags=["Implementation", "Strings"],
        skills=["Greedy algorithms"],
        question="""Return the number (1 to 3999) in Roman numerals, with 4 as IV, 9 as IX, 40 as XL, 90 as XC,
400 as CD and 900 as CM.
""",
        starter="def to_roman(number):\n",
        answer=to_roman,
        cases=[
            (n,)
            for n in (
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                9,
                10,
                14,
                39,
                40,
                49,
                88,
                90,
                400,
                444,
                888,
                900,
                999,
                1994,
                3999,
            )
        ],
        more=lambda rng: (rng.randint(1, 3999),),
        solutions=[
            """def to_roman(number):
    text = ""
    for mark in ("I V X", "X L C", "C D M", "M _ _"):
        one, five, ten = mark.split()
        digit = number % 10
        number //= 10
        shapes = ["", one, one * 2, one * 3, one + five, five, five + one, five + one * 2, five + one * 3]
        text = (shapes + [one + ten])[digit] + text
    return text
"""
        ],
    ),
    Source(
        name="edit-distance",
        difficulty="MEDIUM_HARD",
        tags=["Dynamic programming", "Strings"],
        skills=["Dynamic programming"],
        time_limit="2 seconds",
        question="""Return the smallest number of changes that turn one word into another. A change puts a letter
in, takes one out, or replaces one by another.
""",
        starter="def edit_distance(first, second):\n",
        answer=edit_distance,
        cases=[
            ("", ""),
            ("a", ""),
            ("", "abc"),
            ("a", "a"),
            ("a", "b"),
            ("kitten", "sitting"),
            ("ab", "ba"),
            ("abc", "abcd"),
            ("flaw", "lawn"),
            ("aaaa", "aa"),
            ("intention", "execution"),
        ],
        more=some_words,
        solutions=[
            """def edit_distance(first, second):
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first):
        above, row = row, [i + 1]
        for j, other in enumerate(second):
            row.append(min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]
"""
        ],
    ),
    Source(
        name="calculate",
        difficulty="HARD",
        tags=["Parsing", "Stack"],
        skills=["Data structures"],
        question="""Return the value of an expression of whole numbers, + - * and parentheses. Multiplication
binds tighter; equal operators go from left to right. Spaces may stand anywhere between the parts.
""",
        starter="def calculate(text):\n",
        answer=calculate,
        cases=[
            ("7",),
            ("1+2",),
            ("2*3+4",),
            ("2+3*4",),
            ("(2+3)*4",),
            ("10-3-2",),
            (" 1 - ( 2 - 3 ) ",),
            ("((5))",),
            ("2*(3*(4+1))-1",),
            ("0*99",),
            ("12-5*2*1",),
            ("100 + 200",),
        ],
        more=lambda rng: (some_sum(rng),),
        solutions=[
            """import re


def calculate(text):
    tokens = re.findall(r"[0-9]+|[-+*()]", text)[::-1]

    def factor():
        token = tokens.pop()
        if token != "(":
            return int(token)
        value = total()
        tokens.pop()
        return value

    def product():
        value = factor()
        while tokens[-1:] == ["*"]:
            tokens.pop()
            value *= factor()
        return value

    def total():
        value = product()
        while tokens[-1:] == ["+"] or tokens[-1:] == ["-"]:
            value = value + product() if tokens.pop() == "+" else value - product()
        return value

    return total()
"""
        ],
    ),
    Source(
        name="queens",
        difficulty="VERY_HARD",
        tags=["Backtracking", "Bit manipulation"],
        skills=["Complete search", "Bit manipulation"],
        time_limit="2 seconds",
        question="""Return in how many ways as many queens as the board has rows can stand on a square board so
that no two share a row, a column or a diagonal. Boards that are turned or mirrored count on their own.
""",
        starter="def queens(size):\n",
        answer=queens,
        cases=[(n,) for n in range(1, 8)],
        more=lambda rng: (rng.randint(4, 7),),
        solutions=[
            """def queens(size):
    def place(row, columns, rising, falling):
        if row == size:
            return 1
        return sum(
            place(row + 1, columns | {c}, rising | {row + c}, falling | {row - c})
            for c in range(size)
            if not (c in columns or row + c in rising or row - c in falling)
        )

    return place(0, frozenset(), frozenset(), frozenset())
"""
        ],
    ),
    Source(
        name="medians",
        difficulty="HARD",
        tags=["Sorting", "Sliding window"],
        skills=["Sorting", "Data structures"],
        policy="float",
        time_limit="3 seconds",
        question="""Return the list of the medians of all windows of the given width, from left to right, as
floating-point numbers. The median of an even number of values is the mean of the middle two.
""",
        starter="def medians(values, width):\n",
        answer=medians,
        cases=[
            ([1], 1),
            ([1, 2], 1),
            ([1, 2], 2),
            ([3, 1, 2], 3),
            ([1, 1, 1], 2),
            ([5, -5, 0, 8], 2),
            ([9, 8, 7, 6, 5], 4),
            ([1, 3, -1, -3, 5, 3, 6, 7], 3),
        ],
        more=lambda rng: (
            [rng.randint(-50, 50) for _ in range(rng.randint(5, 14))],
            rng.randint(1, 5),
        ),
        solutions=[
            """from bisect import bisect_left, insort


def medians(values, width):
    window = []
    found = []
    for place, value in enumerate(values):
        insort(window, value)
        if len(window) > width:
            window.pop(bisect_left(window, values[place - width]))
        if len(window) == width:
            found.append((window[width // 2] + window[(width - 1) // 2]) / 2)
    return found
"""
        ],
    ),
    Source(
        name="two-singles",
        difficulty="MEDIUM_HARD",
        tags=["Bit manipulation"],
        skills=["Bit manipulation"],
        question="""In a list of whole numbers (0 or more) all but two stand twice, and the two stand once. Return
the two, the smaller first.
""",
        starter="def two_singles(values):\n",
        answer=two_singles,
        cases=[
            ([0, 1],),
            ([2, 1],),
            ([3, 3, 5, 4],),
            ([1, 2, 1, 4],),
            ([0, 7, 7, 128],),
            ([5, 6, 9, 9],),
            ([1023, 1024],),
            ([6, 6, 8, 2, 8, 3],),
        ],
        more=some_singles,
        solutions=[
            """from functools import reduce
from operator import xor


def two_singles(values):
    both = reduce(xor, values)
    bit = both & -both
    one = reduce(xor, [value for value in values if value & bit])
    return sorted([one, both ^ one])
"""
        ],
    ),
)
