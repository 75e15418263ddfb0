"""Reading problems: TACO's schema and its oddities, HumanEval's and MBPP's, the shipped set, what
is refused."""

import json

import pytest

from eagle.errors import EagleError
from inference.evaluation.problem import fenced
from inference.evaluation.problems import load_problems
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


def pairs(inputs, outputs, **more):
    return {"input_output": json.dumps({"inputs": inputs, "outputs": outputs, **more})}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_taco_rows(tmp_path):
    called = pairs([[1]], [[2]], fn_name="double")
    rows = [taco(), taco(**called, starter_code="def double(x):\n"), taco(**called)]
    first, second, third = load_problems(write(tmp_path / "x.jsonl", rows)).problems
    assert (first.task_id, second.task_id) == ("0", "1")  # TACO has no ids: the row's place is it
    assert first.prompt == "\nQUESTION:\nDouble the number.\nUse Standard Input format\nANSWER:\n"
    assert first.suite().inputs == ["1\n", "2\n"] and first.suite().fn_name is None
    assert first.skills == ("Greedy algorithms", "Sorting") and first.difficulty == "EASY"
    assert (first.seconds, first.memory_bytes) == (2.0, 256 * 2**20)
    assert first.policy == "strict" and not first.special_judge
    assert second.prompt.endswith("number.def double(x):\n\nUse Call-Based format\nANSWER:\n")
    assert third.prompt.endswith("\nUse Call-Based format\nANSWER:\n")
    assert second.suite().fn_name == "double"


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_other_files_hold_the_same_problems(tmp_path, kind):
    rows = [taco(question=str(i), url=None) for i in range(3)]
    expected = load_problems(write(tmp_path / "x.jsonl", rows)).problems
    path = tmp_path / f"x.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        parts = {path: rows}
        if kind == "folder":
            path.mkdir()
            parts = {path / "a.parquet": rows[:2], path / "b.parquet": rows[2:]}
        for file, part in parts.items():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), file)
    assert load_problems(path).problems == expected


SECONDS = {"1 second": 1, "2.0 seconds": 2, "0.5 - 1.5 seconds": 1.5, "500 ms": 0.5, 3: 3}
SIZES = {"256.0 megabytes": 2**28, "1 GB": 2**30, "64 MiB": 2**26, "512 kilobytes": 2**19}


def test_limits_are_prose():
    for nothing in (None, "", "soon", "a lot"):
        assert read_seconds(nothing) is None and read_bytes(nothing) is None
    assert {text: read_seconds(text) for text in SECONDS} == SECONDS
    assert {text: read_bytes(text) for text in SIZES} == SIZES and read_bytes("100 bytes") == 100


@pytest.mark.parametrize(
    "changes, policy, special",
    [
        ({"question": "If there are multiple answers, print any of them."}, "strict", True),
        ({"question": "Print the words in any order."}, "strict", True),
        ({"question": "You may print each letter in any case."}, "nocase", False),
        ({"question": "Add any two numbers."}, "strict", False),
        (pairs(["1"], ["x 0.5\n"]), "float", False),
        (pairs([[1]], [[0.5]], fn_name="f"), "float", False),
        (pairs(["1"], ["v1.5\n"]), "strict", False),
        ({"judge": '{"policy": "unordered"}', "question": "in any order"}, "unordered", False),
        ({"judge": '{"special": true}'}, "strict", True),
    ],
)
def test_how_a_problem_is_compared(tmp_path, changes, policy, special):
    (problem,) = load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems
    assert (problem.policy, problem.special_judge) == (policy, special)


BAD = [
    {"input_output": ""},
    pairs([], []),
    pairs(["1"], []),
    pairs([1], ["1"]),
    pairs(["1"], ["1"], fn_name="f"),
    {"input_output": "{"},
    {"input_output": "[]"},
    {"question": None},
    {"question": 3},
    {"solutions": "print(1)"},
    {"solutions": "[1]"},
    {"skill_types": "__import__('os')"},
    {"skill_types": "[1]"},
    {"judge": json.dumps({"policy": "lenient"})},
    {"task_id": [1]},
]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_rows_are_listed_or_stop(tmp_path, changes):
    path = write(tmp_path / "x.jsonl", [taco(), taco(**changes), taco(), taco()])
    name = next(iter(changes))
    with pytest.raises(EagleError, match=f"1 of 4 rows .* first .*x.jsonl:2: .*{name}"):
        load_problems(path)
    found = load_problems(path, max_bad_fraction=0.25)
    assert [p.task_id for p in found.problems] == ["0", "2", "3"]  # a place in the file stays one
    (bad,) = found.bad
    assert bad["row"].endswith("x.jsonl:2") and name in bad["reason"]


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
    for name in ("empty.jsonl", "absent.jsonl", "text.parquet"):
        with pytest.raises(EagleError):
            load_problems(tmp_path / name)


def test_selection():
    every = load_problems(None).problems
    easy = load_problems(None, difficulties=["EASY"], skills=["Data structures"])
    assert [p.task_id for p in easy.problems] == ["brackets"]
    assert [p.task_id for p in load_problems(None, limit=2).problems] == [
        p.task_id for p in every[:2]
    ]
    assert {p.policy for p in load_problems(None, policy="float").problems} == {"float"}
    for wrong in (
        {"difficulties": ["EASY", "EASYISH"]},
        {"skills": ["Cooking"]},
        {"difficulties": ["EASY"], "skills": ["Range queries"]},
    ):
        with pytest.raises(EagleError, match="no problem has"):
            load_problems(None, **wrong)


def test_the_fingerprint_is_of_what_judges(tmp_path):
    def of(**changes):
        return load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems[0].fingerprint

    others = {of(**pairs(["1"], ["2"])), of(time_limit="9 s"), of(judge='{"policy": "nocase"}')}
    assert of() == of(question="Twice the number.", difficulty="HARD")
    assert len(others | {of()}) == 4


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return pi * r * r\n",
    "test": "def check(f):\n    assert f(0) == 0\n    assert 3 < f(1) < 4\n",
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
    fences = [f"```python\n{whole}```", f"```\n{whole}```"]
    for text, chat in ((answer, True), *((text, False) for text in fences)):
        program = human.program(text, chat)  # with its imports
        assert program.endswith(whole) and program.startswith(HUMANEVAL["prompt"])
        compile(program, "x", "exec")
    assert basic.program("x = 1\nassert x") == "x = 1"
    assert basic.program("x = 1\n```") == "x = 1" and basic.program("```") == "```"
    assert fenced("a\n```\nb\n```\n```py\nc\n```") == "c\n"
    assert fenced("a\n```text\nb") == "b\n" and fenced("a\nb") == "a\nb"


def test_the_shipped_set_is_varied():
    problems = load_problems(None).problems
    counts = [len(p.suite().inputs) for p in problems]
    assert 12 <= len(problems) and sum(counts) >= 400 and min(counts) >= 7
    assert {p.difficulty for p in problems} == set("EASY MEDIUM MEDIUM_HARD HARD VERY_HARD".split())
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
    assert problem.checker("3\n1\n3\n", "-1\n", b"-1")
    assert not problem.checker("3\n1\n3\n", "-1\n", b"1 1")
