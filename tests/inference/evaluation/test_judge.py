"""From suites and outcomes to verdicts, and through the real sandbox."""

import pytest

from eagle.errors import EagleError
from inference.evaluation.judge import (
    POLICIES,
    VERDICTS,
    Grading,
    Suite,
    SuiteResult,
    Verdict,
    judge,
    make_job,
    run_and_judge,
)
from inference.evaluation.sandbox import STATUSES, Limits, Outcome, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    limits = Limits(cpu_seconds=0.5, wall_seconds=1.5, memory_bytes=256 << 20, output_bytes=1 << 20)
    with Sandbox(limits, workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


ADD = Suite(["1 2\n", "3 4\n", "5 6\n"], ["3\n", "7\n", "11\n"])
RIGHT = "print(sum(map(int, input().split())))"


def printed(*texts):
    return [Outcome("ok", stdout=text.encode()) for text in texts]


def returned(*values):
    return [Outcome("ok", value=value) for value in values]


def statuses(verdicts):
    return [v.status for v in verdicts]


# -- suites --


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
def test_bad_suites_are_errors(suite, message, sandbox):
    for use in (
        suite.check,
        lambda: judge(suite, []),
        lambda: run_and_judge(sandbox, RIGHT, suite),
    ):
        with pytest.raises(EagleError, match=message):
            use()


def test_lists_of_lines():
    suite = Suite([["1 2", "3"], "4"], [["5", 6], "7\n"])
    assert suite.tests() == ["1 2\n3", "4"]
    assert statuses(judge(suite, printed("5\n6\n", "7"))) == ["accepted", "accepted"]
    assert statuses(judge(suite, printed("5 6\n", "7"))) == ["wrong", "accepted"]


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


# -- judging --


def test_policies_by_name():
    assert {"strict", "float", "nocase", "unordered", "taco_legacy"} <= POLICIES.keys()
    with pytest.raises(EagleError, match="unknown comparison policy 'lax'; known: strict"):
        judge(ADD, [], "lax")


def test_every_status_has_its_verdict():
    outcomes = [
        Outcome(status, detail="why", seconds=2, cpu_seconds=1)
        for status in STATUSES
        if status != "ok"
    ]
    suite = Suite(["x"] * len(outcomes), [""] * len(outcomes))
    verdicts = judge(suite, outcomes)
    assert statuses(verdicts) == [o.status for o in outcomes]
    assert set(statuses(verdicts)) | {"accepted", "wrong"} == set(VERDICTS)
    assert verdicts[0] == Verdict(outcomes[0].status, "why", 2, 1, False)


def test_output_of_a_failed_program_is_never_accepted():
    outcome = Outcome("runtime_error", stdout=b"3\n")
    assert statuses(judge(Suite(["1"], ["3"]), [outcome])) == ["runtime_error"]


def test_more_outcomes_than_tests():
    with pytest.raises(EagleError, match="2 outcomes for 1 tests"):
        judge(Suite(["1"], ["1"]), printed("1", "1"))


def test_a_checker_of_ones_own():
    suite = Suite(["10\n", "12\n"], ["2 5\n", "3 4\n"])

    def product(given, expected, got):
        factors = [int(token) for token in got.split()]
        return len(factors) == 2 and factors[0] * factors[1] == int(given)

    assert statuses(judge(suite, printed("5 2", "4 4"), product)) == ["accepted", "wrong"]
    broken = judge(suite, printed("x y", "3 4"), product)
    assert statuses(broken) == ["harness_error", "accepted"] and "ValueError" in broken[0].detail


def result(*found, tests=None):
    return SuiteResult([Verdict(status) for status in found], tests or len(found))


@pytest.mark.parametrize(
    "found, status",
    [
        (result("accepted", "accepted"), "accepted"),
        (result("accepted", "wrong"), "wrong"),
        (result("timeout", "wrong"), "timeout"),
        (result("accepted", "harness_error"), "harness_error"),
        (result("harness_error", "wrong"), "wrong"),
        (result("accepted", tests=2), "harness_error"),
        (result("wrong", tests=2), "wrong"),
    ],
)
def test_status_of_a_suite(found, status):
    assert found.status == status and found.accepted == (status == "accepted")
    assert found.passed == statuses(found.verdicts).count("accepted")


# -- outputs of calls that may be wrapped --


@pytest.mark.parametrize(
    "outputs, values, found",
    [
        ([[3], [7]], [3, 7], "accepted accepted"),
        ([[3], [7]], [[3], [7]], "accepted accepted"),
        ([[3], [7]], [3, 8], "accepted wrong"),
        ([[3], [7]], [[3], 7], "accepted wrong"),  # one reading for all tests
        ([[3], [7]], [3, [7]], "accepted wrong"),
        ([[3, 4], [7]], [3, 7], "wrong wrong"),
        ([[3, 4], [7]], [[3, 4], [7]], "accepted accepted"),
        ([[[1, 2]], [[3]]], [[1, 2], [3]], "accepted accepted"),
        ([[None]], [None], "accepted"),
        ([3, [7]], [3, 7], "accepted wrong"),
    ],
)
def test_wrapped_outputs(outputs, values, found):
    suite = Suite([[0]] * len(outputs), outputs, "f")
    got = statuses(judge(suite, returned(*values)))
    assert sorted(got) == sorted(found.split())


def test_stdin_outputs_of_one_line_are_not_wrapped():
    assert statuses(judge(Suite(["x"], [["3"]]), printed("3"))) == ["accepted"]


def test_legacy_unwraps_in_its_own_way():
    suite = Suite([[0]] * 2, [[3, 9], 7], "f")
    assert statuses(judge(suite, returned(3, 7), "taco_legacy")) == ["accepted", "accepted"]


def test_stopping_early():
    grading = Grading(ADD, "strict", stop_at_first_failure=True)
    assert not grading(0, printed("3")[0])
    assert not grading(1, Outcome("harness_error")), (
        "not the program's failure: the next test may decide"
    )
    assert grading(2, printed("12")[0])
    assert grading.result().status == "wrong"
    wrapped = Grading(Suite([[0]] * 2, [[3], [7]], "f"), "strict", stop_at_first_failure=True)
    assert not wrapped(0, returned(3)[0]), "right under one reading"
    assert wrapped(1, returned([7])[0]), "but not under the same one"


# -- with the sandbox --


def test_right_and_wrong(sandbox):
    found = run_and_judge(sandbox, RIGHT, ADD)
    assert found.accepted and found.passed == found.tests == 3
    found = run_and_judge(sandbox, "print(3)", ADD)
    assert statuses(found.verdicts) == ["accepted", "wrong", "wrong"]
    found = run_and_judge(sandbox, "print(4)", ADD, stop_at_first_failure=True)
    assert statuses(found.verdicts) == ["wrong"] and found.tests == 3


def test_calls_have_the_usual_names(sandbox):
    code = "class Solution:\n    def f(self, x: List[int]) -> int:\n        return pow(reduce(gcd, x), 3, 5) + Counter(x)[4]"
    assert run_and_judge(sandbox, code, Suite([[[4, 8]], [[3]]], [[5], [2]], "f")).accepted


def test_standard_input_has_no_names_for_nothing(sandbox):
    assert run_and_judge(sandbox, "print(sqrt(4))", Suite(["x"], ["2.0"])).status == "runtime_error"


@pytest.mark.parametrize("fn_name", [None, "f"])
@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "class Agreeable(str):\n    __eq__ = lambda *_: True\n    __hash__ = str.__hash__\n"
        "print(Agreeable('x'))\ndef f(*_): return Agreeable('x')",
        "class Agreeable(list):\n    __eq__ = lambda *_: True\n    __hash__ = object.__hash__\n"
        "def f(*_): return Agreeable()",
        "def f(*_): return float('nan')\nprint(float('nan'))",
        "def f(*_): return float('inf')\nprint(float('inf'))",
        "def f(*_): return [[[]]]\nprint([[[]]])",
    ],
    ids=range(7),
)
def test_tricks_are_never_accepted(sandbox, code, fn_name):
    suite = Suite([[1]], [[42]], "f") if fn_name else Suite(["1\n"], ["42\n"])
    for policy in POLICIES:
        assert run_and_judge(sandbox, code, suite, policy).status in ("wrong", "runtime_error")


def test_jobs_in_parallel_and_in_series_give_the_same(sandbox):
    codes = [RIGHT, "print(3)", "1/0", "def f(:", "while True: pass"] * 2
    series = [run_and_judge(sandbox, code, ADD, stop_at_first_failure=True) for code in codes]
    jobs = [make_job(code, ADD, stop_at_first_failure=True, key=i) for i, code in enumerate(codes)]
    for job, outcomes in sandbox.map(jobs):
        assert not any(outcome.stdout for outcome in outcomes), (
            "output is not kept once it is judged"
        )
        assert statuses(job.observe.result().verdicts) == statuses(series[job.key].verdicts)
    assert [found.status for found in series[:5]] == [
        "accepted",
        "wrong",
        "runtime_error",
        "compile_error",
        "timeout",
    ]
