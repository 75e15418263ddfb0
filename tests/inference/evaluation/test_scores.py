"""pass@k, its intervals and splits, and what is refused."""

import itertools
import json
import math
import random

import pytest

from eagle.errors import EagleError
from inference.evaluation.generations import Generations, Sample
from inference.evaluation.judge import Verdict
from inference.evaluation.problem import Problem, ProblemSet
from inference.evaluation.report import markdown, write
from inference.evaluation.scores import assemble, by_problem, interval, pass_at_k


def test_pass_at_k_is_the_share_of_draws_with_a_right_program():
    for n in (1, 2, 5, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            share = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)  # large counts do not overflow
    found = by_problem({"a": (2, 1), "b": (4, 1), "c": (1, 1)}, 1)  # n may vary
    assert found == {"a": 0.5, "b": 0.25, "c": 1.0}


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


PROBLEMS = [
    problem("a", difficulty="HARD", skills=("Sorting",)),
    problem("b", difficulty="EASY", skills=("Sorting", "Greedy"), special_judge=True),
    problem("c", difficulty="EASY"),
]
SET = ProblemSet(PROBLEMS, "set.jsonl")
A, W, H = "accepted", "wrong", "harness_error"


def report(ks, *more, **ended):
    """ended: {problem: statuses}."""
    samples = [Sample(task, i, "x") for task, found in ended.items() for i in range(len(found))]
    verdicts = {s.name: Verdict(ended[s.task_id][s.sample], isolation="ns") for s in samples}
    return assemble(SET, Generations(samples), verdicts, ks, *more)


def checked(excluded):
    found = [{"task_id": task, "reason": "fails"} for task in excluded]
    kept = [task for task in "ab" if task not in excluded]
    return {"verified": kept, "excluded": found, "unverified": ["c"]}


def test_splits_and_causes():
    result = report([1, 2], a=[A, W], b=[W, "timeout"], c=[A, A])
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


def test_harness_errors_are_not_the_models():
    ended = {"a": [A, H], "b": [A, A], "c": [A, A]}
    result = report([1], None, 0.2, **ended)
    assert result["pass_at_k"]["pass@1"]["value"] == 1.0
    assert result["programs_a_problem"] == [1, 2]
    with pytest.raises(EagleError, match=r"a \(1\)"):  # and they do not count as programs
        report([2], None, 0.2, **ended)
    result = report([1], **ended)
    assert "harness error" in result["refused"] and result["pass_at_k"] is None
    page = markdown(result)
    assert "No score" in page and "%]" not in page


def test_excluded_problems_do_not_count_and_none_is_dropped_otherwise():
    result = report([1], checked("c"), a=[A], b=[A], c=[W])
    assert result["pass_at_k"]["pass@1"] == {"value": 1.0, "ci95": None, "problems": 2}
    with pytest.raises(EagleError, match="all 3 problems are excluded"):
        report([1], checked("abc"), a=[A], b=[A], c=[W])
    with pytest.raises(EagleError, match=r"c \(0\)"):
        report([1], a=[A], b=[A])


def test_pages_and_upstreams_metrics_file(tmp_path):
    result = report([1, 2], checked([]), a=[A, W], b=[W, W], c=[A, A])
    write(tmp_path, result)
    raw = json.loads((tmp_path / "metrics.json").read_text())
    assert raw["pass@1"] == 0.5 and raw["detail"]["pass@1"] == {"a": 0.5, "b": 0.0, "c": 1.0}
    assert "detail" not in json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    assert "| all | 3 | 50.00% [0.00%, 100.00%] | 66.67%" in page and "| isolation | ns |" in page
    assert "| wrong | 3 | 50.0% |" in page and "their tests taken as right | 1 |" in page
    assert "| a | fails |" in markdown(report([1], checked("a"), a=[A], b=[W], c=[A]))
