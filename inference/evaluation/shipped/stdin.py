"""Problems that read standard input and print."""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction

from .source import Source, numbers


def listed(values: list[int]) -> str:
    return numbers([len(values)], values)


def even_sum(values):
    total = 0
    for value in values:
        if value % 2 == 0:
            total += value
    return f"{total}\n"


def brackets(text):
    while (shorter := text.replace("()", "").replace("[]", "").replace("{}", "")) != text:
        text = shorter
    return "No\n" if text else "Yes\n"


def some_brackets(rng: random.Random) -> tuple[str]:
    text = ""
    for _ in range(rng.randint(1, 8)):
        opening, closing = rng.choice(["()", "[]", "{}"])
        place = rng.randint(0, len(text))
        text = text[:place] + opening + text[place:] + closing  # often, not always, balanced
    if rng.random() < 0.6:
        text = text[: len(text) // 2]
        text += "".join({"(": ")", "[": "]", "{": "}"}.get(c, "") for c in reversed(text))
    return (text,)


def run_length(text):
    lines, start = [], 0
    for end in range(1, len(text) + 1):
        if end == len(text) or text[end] != text[start]:
            lines.append(f"{text[start]} {end - start}\n")
            start = end
    return "".join(lines)


def once_words(words):
    found = [word for word in words if words.count(word) == 1]
    return "".join(f"{word}\n" for word in found) or "none\n"


def maze(rows):
    """Distances are lowered until none changes."""
    cells = {(r, c) for r, row in enumerate(rows) for c, mark in enumerate(row) if mark != "#"}
    distance = dict.fromkeys(cells, math.inf)
    distance[(0, 0)] = 0
    changed = True
    while changed:
        changed = False
        for r, c in cells:
            near = min(
                distance.get(n, math.inf) for n in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
            )
            if near + 1 < distance[(r, c)]:
                distance[(r, c)], changed = near + 1, True
    steps = distance.get((len(rows) - 1, len(rows[0]) - 1), math.inf)
    return f"{-1 if steps == math.inf else steps}\n"


def some_maze(rng: random.Random) -> tuple[list[str]]:
    height, width = rng.randint(2, 9), rng.randint(2, 9)
    wall = rng.choice([0.1, 0.25, 0.35])
    rows = [["#" if rng.random() < wall else "." for _ in range(width)] for _ in range(height)]
    rows[0][0] = rows[-1][-1] = "."
    return (["".join(row) for row in rows],)


def rising(values):
    best = []
    for i, value in enumerate(values):
        best.append(1 + max((best[j] for j in range(i) if values[j] < value), default=0))
    return f"{max(best)}\n"


def coins(amount, kinds):
    @functools.cache
    def ways(left: int, used: int) -> int:
        if left == 0:
            return 1
        if left < 0 or used == len(kinds):
            return 0
        return ways(left - kinds[used], used) + ways(left, used + 1)

    return f"{ways(amount, 0)}\n"


def spread(values):
    mean = Fraction(sum(values), len(values))
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return f"{float(mean):.10f} {math.sqrt(variance):.10f}\n"


def merged(intervals):
    """Halves stand for the gaps between whole numbers, so that neighbours do not touch and ends
    do.
    """
    covered = set()
    for a, b in intervals:
        covered.update(range(2 * a, 2 * b + 1))
    lines = []
    for point in sorted(covered):
        if point - 1 not in covered:
            lines.append([point // 2])
        if point + 1 not in covered:
            lines[-1].append(point // 2)
    return numbers([len(lines)], *lines)


def some_intervals(rng: random.Random) -> tuple[list]:
    found = []
    for _ in range(rng.randint(2, 12)):
        a = rng.randint(-20, 40)
        found.append((a, a + rng.choice([0, 1, 2, 3, 5, 12])))
    return (found,)


def pair_sum(goal, values):
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            if values[i] + values[j] == goal:
                return f"{i + 1} {j + 1}\n"
    return "-1\n"


def last_one(count, step):
    circle, place = list(range(1, count + 1)), 0
    while len(circle) > 1:
        place = (place + step - 1) % len(circle)
        circle.pop(place)
    return f"{circle[0]}\n"


def distances(count, roads):
    found = [0] + [math.inf] * (count - 1)
    for _ in range(count):
        for a, b, length in roads:
            found[b - 1] = min(found[b - 1], found[a - 1] + length)
            found[a - 1] = min(found[a - 1], found[b - 1] + length)
    return numbers([-1 if d == math.inf else d for d in found])


def some_roads(rng: random.Random) -> tuple[int, list]:
    count = rng.randint(2, 9)
    roads = []
    for _ in range(rng.randint(count - 1, 2 * count)):
        roads.append((rng.randint(1, count), rng.randint(1, count), rng.choice([0, 1, 2, 7, 30])))
    return count, roads


def smallest(values, orders):
    values, lines = list(values), []
    for kind, a, b in orders:
        if kind == "set":
            values[a - 1] = b
        else:
            lines.append([min(values[a - 1 : b])])
    return numbers(*lines)


def some_orders(rng: random.Random) -> tuple[list, list]:
    values = [rng.randint(-50, 50) for _ in range(rng.randint(1, 13))]
    orders = []
    for _ in range(rng.randint(4, 14)):
        a, b = sorted(rng.choices(range(1, len(values) + 1), k=2))
        orders.append(("min", a, b))
        if rng.random() < 0.5:
            orders.append(("set", rng.randint(1, len(values)), rng.randint(-60, 60)))
            orders.append(("min", 1, len(values)))
    return values, orders


def some_numbers(rng: random.Random, low: int = -30, high: int = 30, least: int = 1) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(least, 25))]


STDIN = (
    Source(
        name="even-sum",
        difficulty="EASY",
        tags=["Implementation"],
        skills=[],
        question="""Given n whole numbers, print the sum of the even ones.

Input: the first line has n (0 <= n <= 1000), the second line n whole numbers between -10^9 and 10^9; it is
empty when n is 0.
Output: one number.

Example input:
4
1 2 3 4
Example output:
6
""",
        answer=even_sum,
        cases=[
            ([],),
            ([7],),
            ([8],),
            ([0],),
            ([-2, -4, -5],),
            ([1, 3, 5],),
            ([2, -2],),
            ([10**9, 10**9],),
            ([-(10**9), 999999999],),
            (list(range(-30, 40)),),
        ],
        more=lambda rng: (some_numbers(rng, -(10**9), 10**9),),
        show=listed,
        solutions=[
            """n = int(input())
print(sum(value for value in map(int, input().split()) if value % 2 == 0))
"""
        ],
    ),
    Source(
        name="brackets",
        difficulty="EASY",
        tags=["Data structures", "Stack"],
        skills=["Data structures"],
        question="""A text of the brackets ( ) [ ] { } is balanced when every bracket that opens is closed by
one of its own kind, in the right order. Print Yes when the given line is balanced and No when it is not.
The empty line is balanced. Each letter may be printed in any case.

Example input:
([]{})
Example output:
Yes
""",
        answer=brackets,
        policy="nocase",
        cases=[
            ("",),
            ("(",),
            (")",),
            ("()",),
            (")(",),
            ("([)]",),
            ("{[()]}",),
            ("(" * 40 + ")" * 40,),
            ("()" * 40,),
            ("(" * 40 + ")" * 39,),
            ("[]]",),
            ("{}{}{",),
            ("(]",),
        ],
        more=some_brackets,
        show="{}\n".format,
        solutions=[
            """import sys

line = sys.stdin.readline().strip()
partner = {")": "(", "]": "[", "}": "{"}
stack = []
good = True
for mark in line:
    if mark not in partner:
        stack.append(mark)
    elif not stack or stack.pop() != partner[mark]:
        good = False
        break
print("YES" if good and not stack else "NO")
"""
        ],
    ),
    Source(
        name="run-length",
        difficulty="EASY",
        tags=["Implementation", "Strings"],
        skills=[],
        question="""Given a line of small letters, print its runs of equal letters from left to right, one a
line: the letter, a space, and how often it stands there in a row.

Example input:
aaabaa
Example output:
a 3
b 1
a 2
""",
        answer=run_length,
        cases=[
            ("a",),
            ("aa",),
            ("ab",),
            ("aba",),
            ("z" * 100,),
            ("abcabc",),
            ("aabbccdd",),
            ("ab" * 30,),
            ("y" * 9 + "z" * 10 + "y" * 11,),
        ],
        more=lambda rng: (
            "".join(rng.choice("abc") * rng.randint(1, 12) for _ in range(rng.randint(1, 9))),
        ),
        show="{}\n".format,
        solutions=[
            """from itertools import groupby

for letter, run in groupby(input()):
    print(letter, len(list(run)))
""",
            """line = input()
start = 0
for place in range(1, len(line) + 1):
    if line[place:place + 1] != line[start]:
        print(line[start], place - start)
        start = place
""",
        ],
    ),
    Source(
        name="once-words",
        difficulty="MEDIUM",
        tags=["Strings", "Hash map"],
        skills=["Data structures"],
        question="""Given a line of words of small letters, print the words that stand in it exactly once,
one a line, in any order. Print none when there is no such word.

Example input:
the cat and the dog
Example output:
cat
and
dog
""",
        answer=once_words,
        policy="unordered",
        cases=[
            (["a"],),
            (["a", "a"],),
            (["a", "b"],),
            (["a", "b", "a"],),
            (["no", "on", "no"],),
            (["x"] * 5 + ["y"],),
            (["aa", "a", "aaa"],),
            (["b", "a", "b", "a"],),
        ],
        more=lambda rng: (
            [
                rng.choice("red green blue grey pink gold rose".split())
                for _ in range(rng.randint(2, 9))
            ],
        ),
        show=lambda words: " ".join(words) + "\n",
        solutions=[
            """from collections import Counter

found = sorted(word for word, count in Counter(input().split()).items() if count == 1)
print("\\n".join(found) if found else "none")
"""
        ],
    ),
    Source(
        name="maze",
        difficulty="MEDIUM",
        tags=["Graph traversal"],
        skills=["Complete search"],
        question="""A maze has free cells (.) and walls (#). A step goes to a free cell above, below, left or
right. Print how many steps the shortest way from the top left to the bottom right cell has, or -1 when there
is none. Both cells are free.

Input: the first line has height and width (1 to 20), then come the rows.
Output: one number.

Example input:
2 3
.#.
...
Example output:
3
""",
        answer=maze,
        cases=[
            (["."],),
            ([".."],),
            ([".", "."],),
            ([".#."],),
            (["..", ".."],),
            ([".#", "#."],),
            (["...", "##.", "..."],),
            (["....", ".##.", "....", "##.."],),
            (["." * 20] * 3,),
            (["." + "#" * 5, "......"],),
            ([".....", "####.", ".....", ".####", "....."],),
            ([".#...", ".#.#.", "...#."],),
        ],
        more=some_maze,
        show=lambda rows: f"{len(rows)} {len(rows[0])}\n" + "".join(row + "\n" for row in rows),
        solutions=[
            """from collections import deque

height, width = map(int, input().split())
rows = [input() for _ in range(height)]
steps = {(0, 0): 0}
queue = deque(steps)
while queue:
    r, c = queue.popleft()
    for place in ((r + 1, c), (r, c + 1), (r - 1, c), (r, c - 1)):
        inside = place[0] in range(height) and place[1] in range(width)
        if inside and rows[place[0]][place[1]] == "." and place not in steps:
            steps[place] = steps[r, c] + 1
            queue.append(place)
print(steps.get((height - 1, width - 1), -1))
"""
        ],
    ),
    Source(
        name="rising",
        difficulty="MEDIUM_HARD",
        tags=["Dynamic programming", "Binary search"],
        skills=["Dynamic programming", "Sorting"],
        time_limit="2.0 seconds",
        question="""Given n whole numbers, print the length of the longest strictly rising subsequence (numbers
may be left out, the others keep their order).

Input: the first line has n (1 <= n <= 10000), the second line n whole numbers.
Output: one number.

Example input:
6
3 1 4 1 5 9
Example output:
4
""",
        answer=rising,
        cases=[
            ([5],),
            ([1, 2],),
            ([2, 1],),
            ([3, 3, 3],),
            (list(range(50)),),
            (list(range(50, 0, -1)),),
            ([1, 3, 2, 4, 3, 5],),
            ([-5, -10, -1, 0],),
            ([10, 9, 2, 5, 3, 7, 101, 18],),
            ([0, 1] * 20,),
        ],
        more=lambda rng: (some_numbers(rng, least=2),),
        show=listed,
        solutions=[
            """from bisect import bisect_left

input()
ends = []
for value in map(int, input().split()):
    place = bisect_left(ends, value)
    ends[place:place + 1] = [value]
print(len(ends))
"""
        ],
    ),
    Source(
        name="coins",
        difficulty="MEDIUM",
        tags=["Dynamic programming"],
        skills=["Dynamic programming"],
        question="""In how many ways can an amount be paid with coins of the given kinds? There are as many coins
of each kind as wanted, and their order does not count.

Input: the first line has the amount (0 to 5000), the second line the kinds, different and positive.
Output: one number.

Example input:
5
1 2 5
Example output:
4
""",
        answer=coins,
        cases=[
            (0, [3]),
            (3, [3]),
            (4, [3]),
            (5, [1, 2, 5]),
            (100, [1, 5, 10, 25, 50]),
            (7, [8, 9]),
            (10, [2, 5, 3, 6]),
            (1, [1]),
            (200, [200, 100, 50, 20, 10, 5, 2, 1]),
            (11, [4, 6]),
        ],
        more=lambda rng: (rng.randint(5, 120), rng.sample(range(1, 30), rng.randint(1, 6))),
        show=lambda amount, kinds: numbers([amount], kinds),
        solutions=[
            """amount = int(input())
ways = [1] + [0] * amount
for coin in map(int, input().split()):
    for total in range(coin, amount + 1):
        ways[total] += ways[total - coin]
print(ways[amount])
"""
        ],
    ),
    Source(
        name="spread",
        difficulty="EASY",
        tags=["Mathematics"],
        skills=[],
        question="""Given n whole numbers, print their mean and their standard deviation (the root of the mean
squared distance from the mean). An error of 10^-6 is allowed.

Input: the first line has n (1 <= n <= 1000), the second line n whole numbers between -10^6 and 10^6.
Output: two numbers.

Example input:
4
1 2 3 4
Example output:
2.5 1.1180339887
""",
        answer=spread,
        policy="float",
        cases=[
            ([4],),
            ([0, 0, 0],),
            ([1, 2],),
            ([-1, 1],),
            ([10**6, -(10**6)],),
            ([1, 1, 1, 5],),
            ([3, 6, 9],),
            ([-7, -7, -8],),
            ([1, 2, 2],),
        ],
        more=lambda rng: (some_numbers(rng, -1000, 1000, least=2),),
        show=listed,
        solutions=[
            """n = int(input())
values = list(map(int, input().split()))
mean = sum(values) / n
print(mean, (sum((value - mean) ** 2 for value in values) / n) ** 0.5)
"""
        ],
    ),
    Source(
        name="merge-intervals",
        difficulty="MEDIUM",
        tags=["Sorting", "Greedy algorithms"],
        skills=["Sorting", "Greedy algorithms"],
        question="""Closed intervals of the number line are given. Unite those that share a point, and print what
is left: how many intervals, then each with its two ends on a line of its own, from left to right.

Input: the first line has n (1 <= n <= 1000), then come n lines with a and b (a <= b).

Example input:
3
5 8
1 3
3 4
Example output:
2
1 4
5 8
""",
        answer=merged,
        cases=[
            ([(1, 1)],),
            ([(1, 2), (3, 4)],),
            ([(1, 3), (3, 4)],),
            ([(1, 9), (2, 3)],),
            ([(5, 6), (1, 2)],),
            ([(1, 2)] * 3,),
            ([(-5, 0), (0, 5), (5, 5)],),
            ([(1, 4), (2, 6), (8, 9)],),
            ([(1, 10), (2, 3), (9, 12)],),
        ],
        more=some_intervals,
        show=lambda intervals: numbers([len(intervals)], *intervals),
        solutions=[
            """pairs = sorted(tuple(map(int, input().split())) for _ in range(int(input())))
merged = []
for a, b in pairs:
    if merged and a <= merged[-1][1]:
        merged[-1][1] = max(merged[-1][1], b)
    else:
        merged.append([a, b])
print(len(merged))
for pair in merged:
    print(*pair)
"""
        ],
    ),
    Source(
        name="pair-sum",
        difficulty="MEDIUM",
        tags=["Hash map"],
        skills=["Data structures"],
        special=True,
        question="""Find two different places in a list whose numbers sum to a goal. Print the two places, the
smaller first, counted from 1, or -1 when there are none. If there are several answers, print any of them.

Input: the first line has the goal, the second line n (1 <= n <= 1000), the third line n whole numbers.

Example input:
10
4
1 4 6 9
Example output:
1 4
""",
        answer=pair_sum,
        cases=[
            (2, [1]),
            (2, [1, 1]),
            (3, [1, 1]),
            (0, [0, 5, 0]),
            (10, [5, 1, 5]),
            (10, [1, 4, 6, 9]),
            (-3, [-1, -2, -3]),
            (8, [4, 3]),
            (7, [3, 3, 4, 4]),
        ],
        more=lambda rng: (rng.randint(-20, 20), some_numbers(rng, -15, 15)),
        show=lambda goal, values: numbers([goal], [len(values)], values),
        solutions=[
            """goal = int(input())
n = int(input())
values = list(map(int, input().split()))
best = (n, n)
last = {}
for j in range(n - 1, -1, -1):
    if goal - values[j] in last:
        best = min(best, (j, last[goal - values[j]]))
    last[values[j]] = j
print(best[0] + 1, best[1] + 1) if best != (n, n) else print(-1)
"""
        ],
    ),
    Source(
        name="last-one",
        difficulty="MEDIUM_HARD",
        tags=["Mathematics"],
        skills=["Amortized analysis"],
        time_limit="1 - 2 seconds",
        question="""n people stand in a circle, numbered from 1. Counting starts with person 1, and each k-th
person who is counted leaves; counting goes on with the next one. Print the number of the last one.

Input: one line with n and k (1 <= n, k <= 100000).
Output: one number.

Example input:
5 2
Example output:
3
""",
        answer=last_one,
        cases=[
            (1, 1),
            (1, 9),
            (2, 1),
            (2, 2),
            (5, 1),
            (5, 2),
            (7, 3),
            (41, 3),
            (64, 2),
            (6, 100),
            (1000, 7),
        ],
        more=lambda rng: (rng.randint(2, 300), rng.randint(1, 40)),
        show=lambda count, step: f"{count} {step}\n",
        solutions=[
            """n, k = map(int, input().split())
place = 0
for size in range(2, n + 1):
    place = (place + k) % size
print(place + 1)
"""
        ],
    ),
    Source(
        name="roads",
        difficulty="HARD",
        tags=["Shortest paths", "Heap"],
        skills=["Data structures", "Greedy algorithms"],
        time_limit="2 seconds",
        question="""Towns 1 … n are joined by roads that can be used both ways. Print for each town how long the
shortest way from town 1 to it is, -1 when there is none.

Input: the first line has n and m, then come m lines with two towns and the length of the road (0 or more).
Two towns may have several roads, and a road may lead back to its own town.
Output: n numbers in one line.

Example input:
3 2
1 2 5
2 2 1
Example output:
0 5 -1
""",
        answer=distances,
        cases=[
            (1, []),
            (2, []),
            (2, [(1, 2, 3)]),
            (2, [(2, 1, 3), (1, 2, 2)]),
            (3, [(1, 1, 4), (2, 3, 1)]),
            (3, [(1, 2, 9), (1, 3, 1), (3, 2, 1)]),
            (4, [(1, 2, 0), (2, 3, 0), (3, 4, 0)]),
            (4, [(1, 2, 1), (2, 3, 1), (3, 4, 1), (1, 4, 2)]),
        ],
        more=some_roads,
        show=lambda count, roads: numbers([count, len(roads)], *roads),
        solutions=[
            """import heapq

n, m = map(int, input().split())
near = {town: [] for town in range(1, n + 1)}
for _ in range(m):
    a, b, length = map(int, input().split())
    near[a].append((b, length))
    near[b].append((a, length))
found = {}
heap = [(0, 1)]
while heap:
    distance, town = heapq.heappop(heap)
    if town not in found:
        found[town] = distance
        for other, length in near[town]:
            heapq.heappush(heap, (distance + length, other))
print(*[found.get(town, -1) for town in near])
"""
        ],
    ),
    Source(
        name="smallest",
        difficulty="HARD",
        tags=["Segment tree"],
        skills=["Range queries", "Data structures"],
        time_limit="0.5 - 2 seconds",
        question="""A list of n numbers is given, and q orders. `min a b` asks for the smallest number at the
places a … b; `set a x` puts x at place a. Places count from 1. Print each answer on a line of its own.

Input: the first line has n and q, the second line the numbers, then come q lines with the orders.

Example input:
3 3
5 2 7
min 1 3
set 2 9
min 1 3
Example output:
2
5
""",
        answer=smallest,
        cases=[
            ([4], [("min", 1, 1)]),
            ([4], [("set", 1, 9), ("min", 1, 1)]),
            ([1, 2, 3], [("min", 2, 3), ("min", 3, 3), ("min", 1, 2)]),
            ([3, 2, 1], [("set", 3, 8), ("min", 1, 3), ("set", 2, 7), ("min", 1, 2)]),
            ([1, 5, 6, 7], [("set", 1, 9), ("min", 1, 4)]),
            ([5] * 8, [("min", 1, 8), ("set", 8, -1), ("min", 1, 7), ("min", 8, 8)]),
        ],
        more=some_orders,
        show=lambda values, orders: numbers([len(values), len(orders)], values, *orders),
        solutions=[
            """n, q = map(int, input().split())
tree = [None] * n + list(map(int, input().split()))
for node in reversed(range(1, n)):
    tree[node] = min(tree[2 * node], tree[2 * node + 1])
for _ in range(q):
    kind, a, b = input().split()
    a, b = int(a), int(b)
    if kind == "set":
        node = n + a - 1
        tree[node] = b
        while node > 1:
            node //= 2
            tree[node] = min(tree[2 * node], tree[2 * node + 1])
    else:
        low, high = n + a - 1, n + b
        best = tree[low]
        while low < high:
            best = min(best, tree[low], tree[high - 1])
            low = (low + 1) // 2
            high = high // 2
        print(best)
"""
        ],
    ),
)
