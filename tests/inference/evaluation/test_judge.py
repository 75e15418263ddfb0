"""From suites and outcomes to verdicts, and through the real sandbox."""

import pytest

from eagle.errors import EagleError
from inference.evaluation.judge import (
    POLICIES,
    VERDICTS,
    Grading,
    Suite,
    SuiteResult,
    make_job,
    run_and_judge,
)
from inference.evaluation.sandbox import STATUSES, Limits, Outcome, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    limits = Limits(0.5, 1.5, memory_bytes=256 << 20, output_bytes=1 << 20)
    with Sandbox(limits, workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


ADD = Suite(["1 2\n", "3 4\n", "5 6\n"], ["3\n", "7\n", "11\n"])
RIGHT = "print(sum(map(int, input().split())))"


def printed(*texts):
    return [Outcome("ok", stdout=text.encode()) for text in texts]


def returned(*values):
    return [Outcome("ok", value=value) for value in values]


def judge(suite, outcomes, policy="strict"):
    grading = Grading(suite, policy)
    for index, outcome in enumerate(outcomes):
        grading(index, outcome)
    return grading.result().verdicts


def statuses(verdicts):
    return " ".join(v.status for v in verdicts)


@pytest.mark.parametrize(
    "suite, message",
    [
        (Suite([], []), "without tests"),
        (Suite([], [], "f"), "without tests"),
        (Suite(["1"], []), "1 inputs but 0 outputs"),
        (Suite("1", "1"), "must be lists"),
        (Suite([1], ["1"]), "text or lists of lines"),
        (Suite(["1"], [{"a": 1}]), "text or lists of lines"),
        (Suite([[["nested"]]], ["1"]), "text or lists of lines"),
        (Suite(["1"], ["1"], "f"), "list of arguments"),
    ],
)
def test_bad_suites_are_errors(suite, message):
    with pytest.raises(EagleError, match=message):
        suite.check()
    with pytest.raises(EagleError, match=message):
        make_job(RIGHT, suite)


def test_lists_of_lines():
    suite = Suite([["1 2", "3"], "4"], [["5", 6], "7\n"])
    assert suite.tests() == ["1 2\n3", "4"]
    assert statuses(judge(suite, printed("5\n6\n", "7"))) == "accepted accepted"
    assert statuses(judge(suite, printed("5 6\n", "7"))) == "wrong accepted"
    assert statuses(judge(Suite(["x"], [["3"]]), printed("3"))) == "accepted"


@pytest.mark.parametrize(
    "arguments, given",
    [
        ([{"1": "a", "20": "b"}], [{1: "a", 20: "b"}]),
        ([{"1": "a", "x": "b"}], [{"1": "a", "x": "b"}]),
        ([{"1": "a"}, 3], [{"1": "a"}, 3]),
        ([{}], [{}]),
        (["1"], ["1"]),
    ],
)
def test_integer_keys_that_json_lost(arguments, given):
    assert Suite([arguments], [1], "f").tests() == [given]


def test_every_status_has_its_verdict():
    failed = [Outcome(s, b"3\n", detail="why", seconds=2, cpu_seconds=1) for s in STATUSES[1:]]
    verdicts = judge(Suite(["x"] * len(failed), ["3"] * len(failed)), failed)
    assert statuses(verdicts) == " ".join(STATUSES[1:]), "though the output is right"
    assert set(VERDICTS) == {"accepted", "wrong", *STATUSES[1:]}
    assert verdicts[0] == Outcome("timeout", detail="why", seconds=2, cpu_seconds=1)


def test_a_checker_of_ones_own():
    suite = Suite(["10\n", "12\n"], ["2 5\n", "3 4\n"])

    def product(given, expected, got):
        factors = [int(token) for token in got.split()]
        return len(factors) == 2 and factors[0] * factors[1] == int(given)

    assert statuses(judge(suite, printed("5 2", "4 4"), product)) == "accepted wrong"
    broken = judge(suite, printed("x y", "3 4"), product)
    assert statuses(broken) == "harness_error accepted" and "ValueError" in broken[0].detail


@pytest.mark.parametrize(
    "found, tests, status",
    [
        ("accepted accepted", 2, "accepted"),
        ("accepted wrong", 2, "wrong"),
        ("timeout wrong", 2, "timeout"),
        ("accepted harness_error", 2, "harness_error"),
        ("harness_error wrong", 2, "wrong"),
        ("accepted", 2, "harness_error"),
        ("wrong", 2, "wrong"),
    ],
)
def test_status_of_a_suite(found, tests, status):
    assert SuiteResult([Outcome(s) for s in found.split()], tests).status == status


@pytest.mark.parametrize(
    "outputs, values, found",
    [
        ([[3], [7]], [3, 7], "accepted accepted"),
        ([[3], [7]], [[3], [7]], "accepted accepted"),
        ([[3], [7]], [3, 8], "accepted wrong"),
        ([[3], [7]], [[3], 7], "accepted wrong"),  # one reading for all tests
        ([[3], [7]], [3, [7]], "wrong accepted"),
        ([[3, 4], [7]], [3, 7], "wrong wrong"),
        ([[3, 4], [7]], [[3, 4], [7]], "accepted accepted"),
        ([[[1, 2]], [[3]]], [[1, 2], [3]], "accepted accepted"),
        ([[None]], [None], "accepted"),
        ([3, [7]], [3, 7], "accepted wrong"),
    ],
)
def test_outputs_of_calls_may_be_wrapped(outputs, values, found):
    suite = Suite([[0]] * len(outputs), outputs, "f")
    assert statuses(judge(suite, returned(*values))) == found


def test_stopping_early():
    grading = Grading(ADD, stop_at_first_failure=True)
    assert not grading(0, printed("3")[0])
    assert not grading(1, Outcome("harness_error")), "not its own: the next test may decide"
    assert grading(2, printed("12")[0])
    assert grading.result().status == "wrong"
    wrapped = Grading(Suite([[0]] * 2, [[3], [7]], "f"), stop_at_first_failure=True)
    assert not wrapped(0, returned(3)[0]), "right under one reading"
    assert wrapped(1, returned([7])[0]), "but not under the same one"


# -- with the sandbox --


def test_right_and_wrong(sandbox):
    codes = {
        RIGHT: "accepted accepted accepted",
        "print(3)": "accepted wrong",
        "print(sqrt(4))": "runtime_error",  # names for nothing are for calls
        "1/0": "runtime_error",
        "def f(:": "compile_error",
    }
    jobs = [make_job(code, ADD, "strict", True, key=code) for code in [*codes] * 2]
    for job, outcomes in sandbox.map(jobs):
        assert not any(outcome.stdout for outcome in outcomes)
        result = job.observe.result()
        assert (statuses(result.verdicts), result.tests) == (codes[job.key], 3)
    assert statuses(run_and_judge(sandbox, "print(3)", ADD).verdicts) == "accepted wrong wrong"


def test_calls_have_the_usual_names(sandbox):
    code = (
        "class Solution:\n    def f(self, x: List[int]) -> int:\n"
        "        return pow(reduce(gcd, x), 3, 5) + Counter(x)[4]"
    )
    suite = Suite([[[4, 8]], [[3]]], [[5], [2]], "f")
    assert run_and_judge(sandbox, code, suite).status == "accepted"


TRICKS = [
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "class Agreeable(str):\n    __eq__ = lambda *_: True\n    __hash__ = str.__hash__\n"
    "print(Agreeable('x'))\ndef f(*_): return Agreeable('x')",
    "class Agreeable(list):\n    __eq__ = lambda *_: True\n    __hash__ = object.__hash__\n"
    "def f(*_): return Agreeable()",
    "def f(*_): return float('nan')\nprint(float('nan'))",
    "def f(*_): return float('inf')\nprint(float('inf'))",
    "def f(*_): return [[[]]]\nprint([[[]]])",
]


@pytest.mark.parametrize("suite", [Suite(["1\n"], ["42\n"]), Suite([[1]], [[42]], "f")])
def test_tricks_are_never_accepted(sandbox, suite):
    jobs = [make_job(code, suite, policy) for code in TRICKS for policy in POLICIES]
    found = {job.observe.result().status for job, _ in sandbox.map(jobs)}
    assert found <= {"wrong", "runtime_error"}
