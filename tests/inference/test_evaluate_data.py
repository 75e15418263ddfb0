"""Reading problems: TACO's schema and its oddities, HumanEval's and MBPP's, the shipped set, what
is refused.
"""

import json

import pytest

from eagle.errors import EagleError
from inference.evaluation import shipped
from inference.evaluation.mutants import mutants
from inference.evaluation.problems import fenced, load_problems
from inference.evaluation.taco import read_bytes, read_seconds


def taco(**changes):
    row = {
        "question": "Double the number.",
        "starter_code": "",
        "solutions": json.dumps(["print(2 * int(input()))"]),
        "input_output": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}),
        "difficulty": "EASY",
        "raw_tags": "[]",
        "tags": "['Mathematics']",
        "skill_types": "['Greedy algorithms', 'Sorting']",
        "time_limit": "2.0 seconds",
        "memory_limit": "256.0 megabytes",
    }
    return {**row, **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_taco_row(tmp_path):
    found = load_problems(write(tmp_path / "x.jsonl", [taco(), taco()]))
    first, second = found.problems
    assert (first.task_id, second.task_id) == ("0", "1")  # TACO has no ids: the row's place is it
    assert first.prompt == "\nQUESTION:\nDouble the number.\nUse Standard Input format\nANSWER:\n"
    assert first.suite().inputs == ["1\n", "2\n"] and first.suite().fn_name is None
    assert first.skills == ("Greedy algorithms", "Sorting") and first.difficulty == "EASY"
    assert (first.seconds, first.memory_bytes) == (2.0, 256 * 2**20)
    assert first.policy == "strict" and not first.special_judge


def test_call_based_prompts_say_so(tmp_path):
    tests = json.dumps({"inputs": [[1]], "outputs": [[2]], "fn_name": "double"})
    rows = [taco(input_output=tests, starter_code="def double(x):\n"), taco(input_output=tests)]
    called, named = load_problems(write(tmp_path / "x.jsonl", rows)).problems
    assert called.prompt.endswith("number.def double(x):\n\nUse Call-Based format\nANSWER:\n")
    assert named.prompt.endswith("\nUse Call-Based format\nANSWER:\n")
    assert called.suite().fn_name == "double"


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_other_files_hold_the_same_problems(tmp_path, kind):
    rows = [taco(question=str(i)) for i in range(3)]
    expected = load_problems(write(tmp_path / "x.jsonl", rows)).problems
    if kind == "json":
        path = tmp_path / "x.json"
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "parts"
        path.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), path / "b.parquet")
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
            path = tmp_path / "x.parquet"
    assert load_problems(path).problems == expected


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1 second", 1.0),
        ("2.0 seconds", 2.0),
        ("0.5 - 1.5 seconds", 1.5),
        ("500 ms", 0.5),
        (None, None),
        ("", None),
        ("soon", None),
        (3, 3.0),
    ],
)
def test_time_limits_are_prose(text, seconds):
    assert read_seconds(text) == seconds


@pytest.mark.parametrize(
    "text, size",
    [
        ("256.0 megabytes", 2**28),
        ("1 GB", 2**30),
        ("64 MiB", 2**26),
        ("512 kilobytes", 2**19),
        (None, None),
        ("a lot", None),
        ("100 bytes", 100),
    ],
)
def test_memory_limits_are_prose(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize(
    "changes, policy, special",
    [
        ({"question": "If there are multiple answers, print any of them."}, "strict", True),
        ({"question": "Print the words in any order."}, "strict", True),
        ({"question": "You may print each letter in any case."}, "nocase", False),
        ({"question": "Add any two numbers."}, "strict", False),
        ({"input_output": json.dumps({"inputs": ["1"], "outputs": ["x 0.5\n"]})}, "float", False),
        (
            {"input_output": json.dumps({"inputs": [[1]], "outputs": [[0.5]], "fn_name": "f"})},
            "float",
            False,
        ),
        ({"input_output": json.dumps({"inputs": ["1"], "outputs": ["v1.5\n"]})}, "strict", False),
        (
            {"judge": json.dumps({"policy": "unordered"}), "question": "in any order"},
            "unordered",
            False,
        ),
        ({"judge": json.dumps({"special": True})}, "strict", True),
    ],
)
def test_how_a_problem_is_compared(tmp_path, changes, policy, special):
    (problem,) = load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems
    assert (problem.policy, problem.special_judge) == (policy, special)


BAD = [
    ({"input_output": ""}, "must be lists"),
    ({"input_output": json.dumps({"inputs": [], "outputs": []})}, "without tests"),
    ({"input_output": json.dumps({"inputs": ["1"], "outputs": []})}, "1 inputs but 0 outputs"),
    ({"input_output": json.dumps({"inputs": [1], "outputs": ["1"]})}, "standard input"),
    (
        {"input_output": json.dumps({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"})},
        "arguments",
    ),
    ({"input_output": "{"}, "input_output is not JSON"),
    ({"input_output": "[]"}, "inputs"),
    ({"question": None}, "has no question"),
    ({"question": 3}, "question must be text"),
    ({"solutions": "print(1)"}, "solutions is not JSON"),
    ({"solutions": "[1]"}, "list of programs"),
    ({"skill_types": "__import__('os')"}, "no Python literal"),
    ({"skill_types": "[1]"}, "list of text"),
    ({"judge": json.dumps({"policy": "lenient"})}, "policy"),
    ({"task_id": [1]}, "task_id"),
]


@pytest.mark.parametrize("changes, reason", BAD, ids=[reason for _, reason in BAD])
def test_bad_rows_are_listed_or_stop(tmp_path, changes, reason):
    path = write(tmp_path / "x.jsonl", [taco(), taco(**changes), taco(), taco()])
    with pytest.raises(
        EagleError, match=f"1 of 4 rows are no problems, first .*x.jsonl:2: .*{reason}"
    ):
        load_problems(path)
    found = load_problems(path, max_bad_fraction=0.25)
    assert [p.task_id for p in found.problems] == ["0", "2", "3"]  # a place in the file stays one
    (bad,) = found.bad
    assert bad["row"].endswith("x.jsonl:2") and reason in bad["reason"]


def test_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(taco()) + "\n{\n\n[1]\n" + json.dumps({"a": 1}) + "\n")
    found = load_problems(path, max_bad_fraction=1.0)
    assert len(found.problems) == 1
    assert [b["row"].rsplit(":", 1)[1] for b in found.bad] == ["2", "4", "5"]


def test_duplicate_ids_and_missing_files(tmp_path):
    path = write(tmp_path / "x.jsonl", [taco(task_id="a"), taco(task_id="b"), taco(task_id="a")])
    with pytest.raises(EagleError, match="several problems of the id a;"):
        load_problems(path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "object.json").write_text("{}")
    for name in ("empty.jsonl", "absent.jsonl", "text.parquet", "broken.json", "object.json", "."):
        with pytest.raises(EagleError):
            load_problems(tmp_path / name)


def test_selection():
    every = load_problems(None)
    easy = load_problems(None, difficulties=["EASY"], skills=["Data structures"])
    assert [p.task_id for p in easy.problems] == ["brackets"]
    assert [p.task_id for p in load_problems(None, limit=2).problems] == [
        p.task_id for p in every.problems[:2]
    ]
    assert {p.policy for p in load_problems(None, policy="float").problems} == {"float"}
    for wrong in (
        {"difficulties": ["EASYISH"]},
        {"skills": ["Cooking"]},
        {"policy": "kind"},
        {"difficulties": ["EASY"], "skills": ["Range queries"]},
    ):
        with pytest.raises(EagleError):
            load_problems(None, **wrong)


def test_the_fingerprint_is_of_what_judges(tmp_path):
    def of(**changes):
        return load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems[0].fingerprint

    other = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    assert of() == of(question="Twice the number.", difficulty="HARD")
    assert (
        len({of(), of(input_output=other), of(time_limit="9 s"), of(judge='{"policy": "nocase"}')})
        == 4
    )


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(0) == 0\n    assert 3.1 < candidate(1) < 3.2\n",
}
MBPP = {
    "task_id": 11,
    "text": "Double a number.",
    "code": "def double(x):\n    return 2 * x\n",
    "test_list": ["assert double(1) == 2", "assert math.isclose(double(0.5), 1)"],
    "test_setup_code": "import math",
}


def test_humaneval_and_mbpp_rows(tmp_path):
    found = load_problems(write(tmp_path / "x.jsonl", [HUMANEVAL, MBPP]))
    human, basic = found.problems
    assert human.prompt == HUMANEVAL["prompt"] and human.task_id == "HumanEval/0"
    assert human.solutions == (HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],)
    assert "Double a number." in basic.prompt and "assert double(1) == 2" in basic.prompt
    assert basic.task_id == "11" and len(basic.suite().inputs) == 2
    # what is expected is nowhere in the program, and differs from test to test
    assert len(set(basic.suite().outputs)) == 2
    for row in ({**MBPP, "test_list": []}, {**MBPP, "test_list": [1]}, {**HUMANEVAL, "test": None}):
        with pytest.raises(EagleError):
            load_problems(write(tmp_path / "x.jsonl", [row]))


def test_the_program_that_a_completion_means(tmp_path):
    human, basic = load_problems(write(tmp_path / "x.jsonl", [HUMANEVAL, MBPP])).problems
    body = "    return pi * r * r\n"
    assert human.program(body + "\ndef other():\n    pass") == HUMANEVAL["prompt"] + body
    assert human.program(body + "```\nThat is it.") == HUMANEVAL["prompt"] + body.rstrip()
    whole = "def area(r):\n    return 3.14 * r * r\n"
    answer = f"Here you are:\n\n```python\n{whole}```\nIt is simple.\n"
    for text, chat in (
        (answer, True),
        (f"```python\n{whole}```", False),
        (f"```\n{whole}```", False),
    ):
        program = human.program(text, chat)
        assert program.endswith(whole) and program.startswith(
            HUMANEVAL["prompt"]
        )  # with its imports
        compile(program, "x", "exec")
    assert basic.program("x = 1\nassert x") == "x = 1"
    assert basic.program("x = 1\n```") == "x = 1" and basic.program("```") == "```"


def test_fenced():
    assert fenced("a\n```\nb\n```\n```py\nc\n```") == "c\n"
    assert fenced("a\n```text\nb") == "b\n"
    assert fenced("a\nb") == "a\nb"


def test_the_shipped_file_is_what_its_sources_make(tmp_path, in_process):
    from inference.evaluation.shipped.__main__ import build

    out = tmp_path / "problems.jsonl"
    code, stdout, _ = in_process(build, "--out", out)
    assert code == 0 and "20 problems" in stdout
    assert out.read_bytes() == shipped.PROBLEMS.read_bytes()


def test_the_shipped_set_is_varied():
    problems = load_problems(None).problems
    tests = [len(p.suite().inputs) for p in problems]
    assert 12 <= len(problems) and sum(tests) >= 400 and min(tests) >= 7
    assert {p.difficulty for p in problems} == {
        "EASY",
        "MEDIUM",
        "MEDIUM_HARD",
        "HARD",
        "VERY_HARD",
    }
    assert {p.suite().fn_name is None for p in problems} == {True, False}
    assert {"strict", "float", "nocase", "unordered"} < {p.policy for p in problems}
    assert len({skill for p in problems for skill in p.skills}) == 8  # TACO's
    assert all(p.solutions for p in problems) and sum(p.special_judge for p in problems) == 1


def test_checkers_are_plugged_in(tmp_path):
    data = write(tmp_path / "x.jsonl", [taco(task_id="a"), taco(task_id="b")])
    file = tmp_path / "checkers.py"
    file.write_text("CHECKERS = {'b': lambda given, expected, got: True}\n")
    a, b = load_problems(data, checkers=file).problems
    assert a.checker is None and b.checker("", "", b"") and b.policy.startswith("checker")
    assert b.fingerprint != load_problems(data).problems[1].fingerprint
    for text in ("CHECKERS = {'c': print}", "", "1 / 0", "def"):
        file.write_text(text)
        with pytest.raises(EagleError, match="checkers"):
            load_problems(data, checkers=file)


def test_the_shipped_checker():
    (problem,) = [p for p in load_problems(None).problems if p.special_judge]
    given, expected = "10\n5\n1 9 5 5 0\n", "1 2\n"
    assert problem.checker(given, expected, b"3 4") and problem.checker(given, expected, b"1\n2\n")
    for wrong in (b"4 3", b"1 1", b"1 3", b"-1", b"", b"1 2 3", b"0 5", b"x y", b"1 6"):
        assert not problem.checker(given, expected, wrong)
    assert problem.checker("3\n1\n3\n", "-1\n", b"-1") and not problem.checker(
        "3\n1\n3\n", "-1\n", b"1 1"
    )


def test_mutants_have_one_mistake_each():
    code = "def f(a, b):\n    if a < b and a != 3:\n        return a + b\n    return f'{a}' * 2 if a in b else -a\n"
    found = mutants(code)
    assert len(set(found)) == len(found) == 8
    assert code not in found and all(compile(m, "m", "exec") for m in found)
    assert any("a >= b" in m for m in found) and any("a < b or" in m for m in found)
    assert mutants(code, limit=3) == [found[i] for i in (0, 2, 5)]
    assert mutants("print 'Python 2'") == [] == mutants("x = 'no operators'")
