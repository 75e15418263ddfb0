"""pass@k, its intervals and splits, and what is refused."""

import itertools
import json
import math
import random

import pytest

from eagle.errors import EagleError
from inference.evaluation.generations import Generations, Sample
from inference.evaluation.problems import Problem, ProblemSet
from inference.evaluation.report import (
    Checked,
    against,
    markdown,
    read_metrics,
    score,
    splits,
    write_metrics,
)
from inference.evaluation.scores import estimate, interval, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_program(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        share = sum(any(i < c for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased_in_n():
    """The mean over random samples of any size is the chance of one right in k."""
    rng, right = random.Random(0), 0.3
    for n in (3, 10):
        found = [
            pass_at_k(n, sum(rng.random() < right for _ in range(n)), 3) for _ in range(20_000)
        ]
        assert sum(found) / len(found) == pytest.approx(1 - 0.7**3, abs=0.01)


def test_large_counts_do_not_overflow():
    assert pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)
    assert pass_at_k(1000, 999, 2) == 1.0


@pytest.mark.parametrize(
    "n,c,k", [(1, 0, 2), (5, 1, 6), (0, 0, 1), (3, 1, 0), (2, 3, 1), (2, -1, 1)]
)
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(EagleError):
        pass_at_k(n, c, k)


def test_n_may_vary_between_problems_but_not_below_k():
    found = estimate({"a": (2, 1), "b": (4, 1), "c": (1, 1)}, 1)
    assert found.detail == {"a": 0.5, "b": 0.25, "c": 1.0}
    assert found.value == pytest.approx((0.5 + 0.25 + 1) / 3)
    with pytest.raises(EagleError, match=r"pass@2 .* c \(1\)"):
        estimate({"a": (2, 1), "c": (1, 1)}, 2)
    with pytest.raises(EagleError, match="no problem"):
        estimate({}, 1)


def test_intervals_hold_the_mean_and_shrink_with_more_problems():
    rng = random.Random(1)
    values = [float(rng.random() < 0.4) for _ in range(400)]
    wide, narrow = interval(values[:25]), interval(values)
    assert wide[0] <= sum(values[:25]) / 25 <= wide[1]
    # the normal approximation is good at this size
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert narrow[1] - narrow[0] == pytest.approx(2 * half, rel=0.1)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2
    assert interval([0.5]) is None and interval([0.0] * 9) is None  # no spread, no statement
    assert interval(values) == narrow  # the same every time


def problem(name, **fields):
    return Problem(name, "p", "q", json.dumps({"inputs": ["1"], "outputs": ["1"]}), **fields)


SET = ProblemSet(
    [
        problem("a", difficulty="HARD", skills=("Sorting",)),
        problem("b", difficulty="EASY", skills=("Sorting", "Greedy"), special_judge=True),
        problem("c", difficulty="EASY"),
    ],
    "set.jsonl",
)


def made(**right):
    """{problem: statuses} -> (generations, statuses)."""
    samples = [Sample(task, i, "x") for task, found in right.items() for i in range(len(found))]
    statuses = {(task, i): s for task, found in right.items() for i, s in enumerate(found)}
    return Generations(samples), statuses


A, W, H = "accepted", "wrong", "harness_error"


def test_splits_and_causes():
    generations, statuses = made(a=[A, W], b=[W, "timeout"], c=[A, A])
    result = score(SET, statuses, generations, [1, 2])
    assert result["pass_at_k"]["pass@1"]["value"] == pytest.approx(0.5)
    assert result["pass_at_k"]["pass@2"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    groups = result["splits"]
    assert list(groups["difficulty"]) == ["EASY", "HARD"]  # from easy to hard
    assert groups["difficulty"]["EASY"]["pass@1"]["value"] == 0.5
    assert groups["skill"]["Sorting"]["pass@1"]["value"] == 0.25
    assert groups["judging"]["one right answer"]["pass@1"]["value"] == 0.75
    assert groups["judging"]["several right answers"]["pass@2"]["value"] == 0.0
    assert result["causes"] == {"accepted": 3, "wrong": 2, "timeout": 1}
    assert result["solved_problems"] == 2 and result["refused"] is None


def test_no_split_by_judging_where_no_problem_has_several_answers():
    assert "judging" not in splits([SET.problems[0], SET.problems[2]])


def test_harness_errors_are_not_the_models():
    generations, statuses = made(a=[A, H], b=[A, A], c=[A, A])
    result = score(SET, statuses, generations, [1], max_harness_errors=0.2)
    assert result["pass_at_k"]["pass@1"]["value"] == 1.0
    assert result["programs_a_problem"] == [1, 2]
    with pytest.raises(EagleError, match=r"a \(1\)"):  # and they do not count as programs
        score(SET, statuses, generations, [2], max_harness_errors=0.2)


def test_too_many_harness_errors_refuse_the_score():
    generations, statuses = made(a=[A, H], b=[A, A], c=[A, A])
    result = score(SET, statuses, generations, [1])
    assert "harness error" in result["refused"] and result["pass_at_k"] is None
    page = markdown({**result, **REST})
    assert "No score" in page and "%]" not in page


def test_excluded_problems_do_not_count():
    checked = Checked(
        "", ["a", "b"], [{"task_id": "c", "reason": "its own solution fails"}], [], "none"
    )
    generations, statuses = made(a=[A], b=[A], c=[W])
    result = score(SET, statuses, generations, [1], checked)
    assert result["pass_at_k"]["pass@1"] == {"value": 1.0, "ci95": None, "problems": 2}
    everything = Checked("", [], [{"task_id": t, "reason": "x"} for t in "abc"], [], "none")
    with pytest.raises(EagleError, match="all 3 problems are excluded"):
        score(SET, statuses, generations, [1], everything)


def test_a_problem_without_programs_is_not_dropped():
    generations, statuses = made(a=[A], b=[A])
    with pytest.raises(EagleError, match=r"c \(0\)"):
        score(SET, statuses, generations, [1])


REST = {
    "data": {
        "name": "set.jsonl",
        "problems": 3,
        "policies": {"strict": 3},
        "malformed": [],
        "verified": 2,
        "excluded": [{"task_id": "z", "reason": "fails"}],
        "unverified": ["c"],
    },
    "generation": None,
    "isolation": ["namespaces"],
    "speed": {"tokens_per_second": None, "samples_per_second": None, "tau": None},
}


def test_markdown_page():
    generations, statuses = made(a=[A, W], b=[W, W], c=[A, A])
    page = markdown({**score(SET, statuses, generations, [1, 2]), **REST})
    assert "| all | 3 | 50.00% [0.00%, 100.00%] | 66.67%" in page
    assert "| wrong | 3 | 50.0% |" in page and "| z | fails |" in page
    assert "namespaces" in page and "1, their tests taken as right" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_upstreams_metrics_file(tmp_path):
    generations, statuses = made(a=[A, W], b=[W, W], c=[A, A])
    result = score(SET, statuses, generations, [1, 2])
    path = tmp_path / "metrics.json"
    write_metrics(path, result)
    raw = json.loads(path.read_text())
    assert raw["pass@1"] == 0.5 and raw["detail"]["pass@1"] == {"a": 0.5, "b": 0.0, "c": 1.0}
    read = read_metrics(path)
    assert read["pass@2"]["detail"]["a"] == 1.0
    read["pass@1"]["detail"]["b"] = 0.5
    found = against(result, read)
    assert found["pass@1"]["differ"] == ["b"] and found["pass@2"]["differ"] == []
    assert "| pass@1 | 50.00% | 50.00% | 3 | b |" in markdown({**result, **REST, "against": found})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pass@1": 1}', '{"pass@1": "x", "detail": {}}'])
def test_bad_metrics_files(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(EagleError, match=str(path)):
        read_metrics(path)
