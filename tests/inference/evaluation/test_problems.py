"""Reading problems: TACO's schema and its oddities, HumanEval's and MBPP's, the shipped set, what
is refused."""

import json
from pathlib import Path

import pytest

from eagle.errors import EagleError
from inference.evaluation.problem import fenced
from inference.evaluation.problems import load_problems, read_bytes, read_seconds

DATA = Path(__file__).parents[2] / "data"
CASES = json.loads((DATA / "problems.json").read_text("utf-8"))
HUMANEVAL, MBPP = CASES["humaneval"], CASES["mbpp"]


def taco(**changes):
    return {**CASES["taco"], **changes}


def pairs(inputs, outputs, **more):
    return {"input_output": json.dumps({"inputs": inputs, "outputs": outputs, **more})}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_taco_rows(tmp_path):
    called = pairs([[1]], [[2]], fn_name="double")
    rows = [taco(), taco(**called, starter_code="def double(x):\n"), taco(**called)]
    path = write(tmp_path / "x.jsonl", rows)
    first, second, third = load_problems(path).problems
    assert load_problems(path, limit=2).problems == [first, second]
    assert (first.task_id, second.task_id) == ("0", "1")  # TACO has no ids: the row's place is it
    assert first.prompt == "\nQUESTION:\nDouble the number.\nUse Standard Input format\nANSWER:\n"
    assert first.suite().inputs == ["1\n", "2\n"] and first.suite().fn_name is None
    assert first.skills == ("Greedy algorithms", "Sorting") and first.difficulty == "EASY"
    assert (first.seconds, first.memory_bytes) == (2.0, 256 * 2**20)
    assert first.policy == "strict" and not first.special_judge
    assert second.prompt.endswith("number.def double(x):\n\nUse Call-Based format\nANSWER:\n")
    assert third.prompt.endswith("\nUse Call-Based format\nANSWER:\n")
    assert second.suite().fn_name == "double"


def test_limits_are_prose():
    for nothing in (None, "", "soon", "a lot"):
        assert read_seconds(nothing) is None and read_bytes(nothing) is None
    seconds = {"1 second": 1, "2.0 seconds": 2, "0.5 - 1.5 seconds": 1.5, "500 ms": 0.5, 3: 3}
    assert {text: read_seconds(text) for text in seconds} == seconds
    sizes = {"256.0 megabytes": 2**28, "1 GB": 2**30, "64 MiB": 2**26, "512 kilobytes": 2**19}
    assert {text: read_bytes(text) for text in sizes} == sizes and read_bytes("100 bytes") == 100


@pytest.mark.parametrize("changes, policy, special", CASES["compared"])
def test_how_a_problem_is_compared(tmp_path, changes, policy, special):
    (problem,) = load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems
    assert (problem.policy, problem.special_judge) == (policy, special)


@pytest.mark.parametrize("changes", CASES["bad"], ids=str)
def test_bad_rows_are_listed_or_stop(tmp_path, changes):
    path = write(tmp_path / "x.jsonl", [taco(), taco(**changes), taco(), taco()])
    name = next(iter(changes))
    with pytest.raises(EagleError, match=f"1 of 4 rows .* first .*x.jsonl:2: .*{name}"):
        load_problems(path)
    found = load_problems(path, max_bad_fraction=0.25)
    assert [p.task_id for p in found.problems] == ["0", "2", "3"]  # a place in the file stays one
    (bad,) = found.bad
    assert bad["row"].endswith("x.jsonl:2") and name in bad["reason"]


def test_lines_that_are_no_rows_and_files_that_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(taco()) + "\n{\n\n[1]\n" + json.dumps({"a": 1}) + "\n")
    found = load_problems(path, max_bad_fraction=1.0)
    assert len(found.problems) == 1
    assert [b["row"].rsplit(":", 1)[1] for b in found.bad] == ["2", "4", "5"]
    with pytest.raises(EagleError, match="several problems of the id a;"):
        load_problems(write(path, [taco(task_id="a"), taco(task_id="b"), taco(task_id="a")]))
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(EagleError):
            load_problems(tmp_path / name)


def test_the_fingerprint_is_of_what_judges(tmp_path):
    def of(**changes):
        return load_problems(write(tmp_path / "x.jsonl", [taco(**changes)])).problems[0].fingerprint

    others = {of(**pairs(["1"], ["2"])), of(time_limit="9 s"), of(judge='{"policy": "nocase"}')}
    assert of() == of(question="Twice the number.", difficulty="HARD")
    assert len(others | {of()}) == 4


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


def test_infilling_rows(tmp_path, cli):
    data, file = DATA / "infilling.jsonl", tmp_path / "g.json"
    first, _ = load_problems(data).problems
    before, line, after = first.prompt, "    s = p * r * r\n", "    return s\n"
    assert first.program(line + "\n# no stop\n") == before + line + "\n# no stop\n" + after
    assert first.program(f"Here:\n```\n{line}```", chat=True) == before + line + after
    made = {first.task_id: [line, "    s = r\n"], "loose": [" 1", " 2"]}
    text = json.dumps([{"task_id": name, "output": texts} for name, texts in made.items()])
    file.write_text(text, "utf-8-sig")
    stage = ("--data", data, "--output", tmp_path / "out", "--allow_code_execution")
    assert cli("verify-dataset", *stage)[1]["verified"] == 2
    causes = cli("execute", *stage, "--generations", file)[1]["causes"]
    assert causes == {"accepted": 2, "wrong": 2}
    without = data.read_text("utf-8-sig").replace("entry_point", "entry")
    with pytest.raises(EagleError, match="check.. and no entry_point"):
        load_problems(write(tmp_path / "x.jsonl", [json.loads(without.split("\n")[0])]))


def test_humaneval_and_mbpp_programs_are_run(tmp_path, cli):
    data, file = write(tmp_path / "x.jsonl", [HUMANEVAL, MBPP]), tmp_path / "g.json"
    made = [{"task_id": k, "output": texts} for k, texts in CASES["completions"].items()]
    file.write_text(json.dumps(made))
    stage = ("--data", data, "--output", tmp_path / "out")
    assert cli("verify-dataset", *stage, "--allow_code_execution")[1]["verified"] == 2
    stage += ("--generations", file)
    _, summary, _ = cli("execute", *stage, "--allow_code_execution")
    assert summary["causes"] == {"accepted": 3, "wrong": 4, "compile_error": 2, "runtime_error": 3}
    _, scored, _ = cli("score", *stage)
    assert scored["pass_at_k"]["pass@1"]["value"] == pytest.approx((2 / 6 + 1 / 6) / 2)


def test_the_program_that_a_completion_means(tmp_path):
    human, basic = load_problems(write(tmp_path / "x.jsonl", [HUMANEVAL, MBPP])).problems
    body = "    return pi * r * r\n"
    assert human.program(body + "\ndef other():\n    pass") == HUMANEVAL["prompt"] + body
    assert human.program(body + "```\nThat is it.") == HUMANEVAL["prompt"] + body.rstrip()
    whole = "def area(r):\n    return 3.14 * r * r\n"
    answer = f"Here you are:\n\n```python\n{whole}```\nIt is simple.\n"
    fences = [f"```python\n{whole}```", f"```\n{whole}```"]
    for text, chat in ((answer, True), *((text, False) for text in fences)):
        assert human.program(text, chat) == f"from math import pi\n\n\n{whole}"
    assert basic.program("x = 1\nassert x") == "x = 1"
    assert basic.program("x = 1\n```") == "x = 1" and basic.program("```") == "```"
    assert fenced("a\n```\nb\n```\n```py\nc\n```") == "c\n"
    assert fenced("a\n```text\nb") == "b\n" and fenced("a\nb") == "a\nb"


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
    [shipped] = [p.checker for p in load_problems(None).problems if p.special_judge]
    given = "10\n5\n1 9 5 5 0\n"
    assert shipped(given, "1 2\n", b"3 4") and shipped(given, "1 2\n", b"1\n2\n")
    for wrong in (b"4 3", b"1 1", b"1 3", b"-1", b"", b"1 2 3", b"0 5", b"x y", b"1 6"):
        assert not shipped(given, "1 2\n", wrong)
    assert shipped("3\n1\n3\n", "-1\n", b"-1") and not shipped("3\n1\n3\n", "-1\n", b"1 1")
