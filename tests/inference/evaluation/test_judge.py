"""From suites and outcomes to verdicts, and through the real sandbox."""

import pytest

from eagle.errors import EagleError
from inference.evaluation.comparators import POLICIES
from inference.evaluation.judge import VERDICTS, Grading, Suite, Verdict, make_job
from inference.evaluation.sandbox import STATUSES, Limits, Outcome, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    limits = Limits(0.5, 1.5, memory_bytes=256 << 20, output_bytes=1 << 20)
    with Sandbox(limits, workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


ADD = Suite(["1 2\n"], ["3\n"])


def printed(*texts):
    return [Outcome("ok", stdout=text.encode()) for text in texts]


def judge(suite, outcomes, policy="strict"):
    grading = Grading(suite, policy)
    stops = [grading(index, outcome) for index, outcome in enumerate(outcomes)]
    return stops[-1], grading.verdict()


def status(*arguments):
    """Of the program, and the test at which it failed."""
    verdict = judge(*arguments)[1]
    return verdict.status, verdict.failed_at


RIGHT = ("accepted", None)


@pytest.mark.parametrize(
    "tests, message",
    [
        (([], []), "without tests"),
        (([], [], "f"), "without tests"),
        ((["1", "2"], ["1"]), "2 inputs but 1 outputs"),
        (([1], ["1"]), "text or lists of lines"),
        ((["1"], [{"a": 1}]), "text or lists of lines"),
        (([[["nested"]]], ["1"]), "text or lists of lines"),
        ((["1"], ["1"], "f"), "list of arguments"),
    ],
)
def test_bad_suites_are_errors(tests, message):
    with pytest.raises(EagleError, match=message):
        Suite(*tests)


def test_lists_of_lines_and_keys():
    suite = Suite([["1 2", "3"], "4"], [["5", 6], "7\n"])
    assert suite.tests() == ["1 2\n3", "4"]
    assert status(suite, printed("5\n6\n", "7")) == RIGHT
    assert status(suite, printed("5 6\n", "7")) == ("wrong", 0)
    # of calls: integer keys that JSON lost
    same = [[{"1": "a", "x": "b"}], [{"1": "a"}, 3], [{}], ["1"]]
    suite = Suite([[{"1": "a", "20": "b"}], *same], [1] * 5, "f")
    assert suite.tests() == [[{1: "a", 20: "b"}], *same]


def test_every_status_has_its_verdict():
    assert set(VERDICTS) == {"accepted", "wrong", *STATUSES[1:]}
    for name in STATUSES[1:]:  # though the output is right
        failed = [Outcome(name, b"3\n", detail="why", seconds=2, cpu_seconds=1)]
        stop, verdict = judge(Suite(["x"], ["3"]), failed)
        assert verdict == Verdict(name, 1, 0, "why", 1)
        assert stop == (name != "harness_error")


def test_a_checker_of_ones_own():
    suite = Suite(["10\n", "12\n"], ["2 5\n", "3 4\n"])

    def product(given, expected, got):
        factors = [int(token) for token in got.split()]
        return len(factors) == 2 and factors[0] * factors[1] == int(given)

    assert status(suite, printed("5 2", "4 4"), product) == ("wrong", 1)
    broken = judge(suite, printed("x y", "3 4"), product)[1]
    assert broken.status == "harness_error" and "ValueError" in broken.detail


def test_status_of_a_suite():
    for found, expected in {
        "ok ok": RIGHT,
        "timeout memory": ("timeout", 0),
        "ok harness_error": ("harness_error", 1),
        "harness_error timeout": ("timeout", 1),  # not its own: the next test may decide
    }.items():
        outcomes = [Outcome(s, b"3" if s == "ok" else b"") for s in found.split()]
        assert status(Suite(["x", "y"], ["3", "3"]), outcomes) == expected


@pytest.mark.parametrize(
    "outputs, values, expected",
    [
        ([[3], [7]], [3, 7], RIGHT),
        ([[3], [7]], [[3], [7]], RIGHT),
        ([[3], [7]], [3, 8], ("wrong", 1)),
        ([[3], [7]], [[3], 7], ("wrong", 1)),  # one reading for all tests
        ([[3], [7]], [3, [7]], ("wrong", 0)),
        ([[3, 4], [7]], [3, 7], ("wrong", 0)),
        ([[3, 4], [7]], [[3, 4], [7]], RIGHT),
        ([[[1, 2]], [[3]]], [[1, 2], [3]], RIGHT),
        ([[None]], [None], RIGHT),
        ([3, [7]], [3, 7], ("wrong", 1)),
    ],
)
def test_outputs_of_calls_may_be_wrapped(outputs, values, expected):
    suite = Suite([[0]] * len(outputs), outputs, "f")
    stop, verdict = judge(suite, [Outcome("ok", value=value) for value in values])
    assert (verdict.status, verdict.failed_at) == expected
    assert stop == (expected != RIGHT)  # wrong under each reading: the rest need not run


def verdicts(sandbox, jobs):
    return {job.key: job.observe.verdict().status for job, _ in sandbox.map(jobs)}


def test_calls_have_the_usual_names(sandbox):
    code = (
        "class Solution:\n    def f(self, x: List[int]) -> int:\n"
        "        return pow(reduce(gcd, x), 3, 5) + Counter(x)[4]"
    )
    suite = Suite([[[4, 8]], [[3]]], [[5], [2]], "f")
    jobs = [make_job(code, suite, key=0), make_job("print(sqrt(4))", ADD, key=1)]  # only calls
    assert verdicts(sandbox, jobs) == {0: "accepted", 1: "runtime_error"}


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
    jobs = [make_job(c, suite, policy, None, (c, policy)) for c in TRICKS for policy in POLICIES]
    assert set(verdicts(sandbox, jobs).values()) <= {"wrong", "runtime_error"}
