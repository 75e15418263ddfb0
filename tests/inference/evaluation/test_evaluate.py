"""Evaluation from end to end, with programs that are really run: the shipped set, stages, kills,
refusals.
"""

import json
import random
import time

import pytest
from commands import Command

from inference.evaluation import journal
from inference.evaluation.executing import Executor, Rules
from inference.evaluation.problems import load_problems
from inference.evaluation.sandbox import Sandbox

ALLOW = "--allow_code_execution"


def generations(path, made):
    """made: {task: completions} -> an upstream file."""
    rows = [{"task_id": task, "output": texts} for task, texts in made.items()]
    path.write_text(json.dumps(rows))
    return path


def test_the_shipped_solutions_pass(tmp_path, cli):
    """With theirs half of the programs are right, in every split."""
    shipped = load_problems(None).problems
    right = {p.task_id: [p.solutions[-1], "print('no')"] for p in shipped}
    file = generations(tmp_path / "right.json", right)
    stage = ("--output", tmp_path / "out")
    assert cli("verify-dataset", *stage, ALLOW, "--workers", 2, "--seconds", 1)[0] == 0
    stage += ("--generations", file)
    code, summary, _ = cli("execute", *stage, ALLOW, "--workers", 1, "--seconds", 1)
    assert code == 0 and summary["programs"] == 40 and summary["causes"]["accepted"] == 20
    code, summary, _ = cli("score", *stage)
    assert code == 0 and summary["pass_at_k"]["pass@1"]["value"] == 0.5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = [e["pass@1"]["value"] for g in report["splits"].values() for e in g.values()]
    assert set(groups) == {0.5}
    data = report["data"]
    assert (data["verified"], data["excluded"], data["unverified"]) == (20, [], [])


# completions of known outcome
OUTCOMES = {
    "accepted": "print(2 * int(input()))",
    "wrong": "print(2 + int(input()))",
    "runtime_error": "print(2 * int(input()) // 0)",
    "compile_error": "print(2 *",
    "timeout": "while True: pass",
    "memory": "x = bytearray(1 << 31)",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_set(path, problems=2):
    """Problems "double" with 3 tests each, and completions of known outcome for them."""
    tests = {"inputs": ["1\n", "5\n", "7\n"], "outputs": ["2\n", "10\n", "14\n"]}
    row = {
        "question": "Double.",
        "solutions": json.dumps([OUTCOMES["accepted"]]),
        "input_output": json.dumps(tests),
        "skill_types": "['Sorting']",
    }
    levels = ("HARD", "EASY")
    own = [{"task_id": f"double{i}", "difficulty": levels[i % 2]} for i in range(problems)]
    return write(path, [{**row, **one} for one in own])


def executed(folder):
    return journal.read(folder / "executions.jsonl")


def test_every_outcome_is_told_apart_and_stages_repeat_nothing(tmp_path, cli):
    data, out = small_set(tmp_path / "x.jsonl", 1), tmp_path / "out"
    file = generations(tmp_path / "g.json", {"double0": list(OUTCOMES.values())})
    stage = ("--data", data, "--output", out, "--generations", file)
    limits = (ALLOW, "--seconds", 0.5, "--memory_mb", 512)
    code, summary, _ = cli("execute", *stage, *limits)
    assert code == 0 and summary["causes"] == dict.fromkeys(OUTCOMES, 1)
    lines = executed(out)
    assert {x["verdict"]["isolation"] for x in lines} == {summary["isolation"]}
    again = cli("execute", *stage, *limits)[1]
    assert again == summary and len(executed(out)) == len(lines)
    code, scored, _ = cli("score", *stage, "--k", "1,2,6")
    values = {k: v["value"] for k, v in scored["pass_at_k"].items()}
    assert values == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@6": 1.0}, abs=1e-6)
    assert scored["causes"] == summary["causes"]
    code, _, err = cli("score", *stage, "--k", 7)
    assert code == 1 and "pass@7 needs at least 7" in err
    more = generations(tmp_path / "h.json", {"double0": [OUTCOMES["wrong"], "z"]})
    code, _, err = cli("score", *stage[:-1], more)
    assert code == 1 and "1 of 2 programs have no verdict" in err and "double0/1" in err
    # another limit is another verdict
    cli("execute", *stage, ALLOW, "--seconds", 0.6, "--memory_mb", 512)
    assert len(executed(out)) == 2 * len(lines)


def test_a_problem_whose_own_solution_fails_is_excluded_and_listed(tmp_path, cli):
    data = small_set(tmp_path / "x.jsonl", 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["solutions"] = json.dumps(["print(1)", OUTCOMES["timeout"]])
    rows[2]["solutions"] = json.dumps(["print 1", OUTCOMES["accepted"]])  # one of them is enough
    rows[3]["solutions"] = "[]"
    write(data, rows)
    stage = ("--data", data, "--output", tmp_path / "out")
    code, summary, err = cli("verify-dataset", *stage, ALLOW, "--seconds", 0.5)
    assert code == 1 and summary["verified"] == 2 and summary["unverified"] == 1
    (row,) = summary["excluded"]
    assert row["task_id"] == "double1" and "timeout in test 1 of 3" in row["reason"]
    assert "excluded: double1" in err
    right = {f"double{i}": [OUTCOMES["accepted"]] for i in range(4)}
    file = generations(tmp_path / "g.json", right)
    cli("execute", *stage, "--generations", file, ALLOW)
    code, scored, _ = cli("score", *stage, "--generations", file)
    assert scored["pass_at_k"]["pass@1"]["problems"] == 3
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| double1 | its own solution: timeout" in page
    assert "their tests taken as right | 1 |" in page


def test_a_broken_checker_is_no_fault_of_the_model(tmp_path, cli):
    data, file, out = small_set(tmp_path / "x.jsonl", 3), tmp_path / "checkers.py", tmp_path / "out"
    file.write_text("CHECKERS = {'double1': lambda given, expected, got: 1 / 0}\n")
    right = {f"double{i}": [OUTCOMES["accepted"]] * 2 for i in range(3)}
    found = generations(tmp_path / "g.json", right)
    stage = ("--data", data, "--checkers", file, "--output", out, "--generations", found)
    _, summary, _ = cli("execute", *stage, ALLOW)
    assert summary["causes"] == {"accepted": 4, "harness_error": 2}
    code, scored, _ = cli("score", *stage)
    assert code == 1 and scored["pass_at_k"] is None and "no score" in scored["refused"]
    assert not (out / "metrics.json").exists()
    # not even above the threshold is the problem dropped
    code, _, err = cli("score", *stage, "--max_harness_errors", 0.5)
    assert code == 1 and "double1 (0)" in err
    # repaired, only they are run again
    file.write_text(file.read_text().replace("1 / 0", "True"))
    before = len(executed(out))
    cli("execute", *stage, ALLOW)
    assert len(executed(out)) == before + 1
    code, scored, _ = cli("score", *stage)
    assert code == 0 and scored["pass_at_k"]["pass@1"]["value"] == 1.0
    assert cli("verify-dataset", *stage[:6], ALLOW)[0] == 0


def test_harness_errors_are_tried_again(tmp_path):
    [problem] = load_problems(small_set(tmp_path / "x.jsonl", 1)).problems
    twice = [(problem, OUTCOMES["accepted"])] * 2
    path = tmp_path / "executions.jsonl"
    with Sandbox(workers=1, allow_code_execution=True) as sandbox:
        with Executor(sandbox, tmp_path, Rules()) as executor:
            executor.run(twice)
            assert executor.done == 2 and len(executor.verdicts) == 1
        path.write_text(path.read_text().replace('"accepted"', '"harness_error"'))
        with Executor(sandbox, tmp_path, Rules()) as executor:
            executor.run(twice)
    assert [r["verdict"]["status"] for r in executed(tmp_path)] == ["harness_error", "accepted"]


@pytest.fixture
def tiny(model_folder, head_folder):
    flags = f"--model {model_folder} --head {head_folder} --dtype float32 --device cpu"
    return f"{flags} --tree 8,3,2 --max_new_tokens 12 --temperature 1.0".split()


def without_speed(folder):
    report = json.loads((folder / "report.json").read_text())
    report["speed"] = {k: report["speed"][k] for k in ("samples", "new_tokens", "tau")}
    return report


def test_from_end_to_end(tmp_path, cli, tiny):
    out, data = tmp_path / "out", small_set(tmp_path / "x.jsonl", 3)
    flags = ("--data", data, "--output", out, *tiny, "--n_samples", 4, "--slots", 3)
    code, summary, err = cli("taco", *flags, ALLOW)
    assert code == 0 and summary["refused"] is None
    assert set(summary["pass_at_k"]) == {"pass@1"}  # 5 and 10 are more than there are
    assert summary["speed"]["samples"] == 12 and summary["speed"]["tau"] >= 1.0
    assert sum(summary["causes"].values()) == 12
    assert "generated 12/12" in err  # those executed by then are not counted again
    assert {"report.md", "metrics.json", "dataset.json"} < {p.name for p in out.iterdir()}
    # again: everything is there already, and the stages on their own give the same
    report, lines = without_speed(out), (out / "executions.jsonl").read_bytes()
    assert cli("taco", *flags, ALLOW)[0] == 0
    assert without_speed(out) == report and (out / "executions.jsonl").read_bytes() == lines
    own = tmp_path / "stages"
    stage = ("--data", data, "--output", own)
    _, made, _ = cli("generate", *stage, *tiny, "--n_samples", 4, "--slots", 2)
    assert (own / "generations.json").read_bytes() == (out / "generations.json").read_bytes()
    cli("verify-dataset", *stage, ALLOW)
    cli("execute", *stage, "--generations", made["generations"], ALLOW)
    cli("score", *stage, "--generations", made["generations"])
    assert without_speed(own) == report


def test_plain_and_speculative_side_by_side(tmp_path, cli, tiny):
    out = tmp_path / "out"
    flags = ("--data", small_set(tmp_path / "x.jsonl", 2), "--output", out, *tiny, "--n_samples", 3)
    code, result, _ = cli("taco", *flags, ALLOW, "--compare")
    assert code == 0 and result["agree"] and result["differing"] == 0 and result["programs"] == 6
    assert result["text"]["vanilla"] == result["text"]["eagle"] and result["vs_vanilla"] > 0
    assert "rouge_l" in result["text"]["eagle"] and result["speed"]["vanilla"]["tau"] == 1.0
    made = [(out / f"generations-{engine}.json").read_bytes() for engine in ("vanilla", "eagle")]
    assert made[0] == made[1]
    assert "0 of 6 programs differ; pass@k is the same." in (out / "compare.md").read_text()
    # one program of one of the two changed afterwards: it is seen, and in float32 it is a failure
    paths = {journal.read(p)[0]["settings"]["engine"]: p for p in out.glob("generations-*.jsonl")}
    lines = paths["eagle"].read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "output": "x"})
    paths["eagle"].write_text("\n".join(lines) + "\n")
    code, result, _ = cli("taco", *flags, ALLOW, "--compare")
    assert code == 1 and result["differing"] == 1 and not result["agree"]
    assert "1 of 6 programs differ" in (out / "compare.md").read_text()


def test_tasks_command(tmp_path, cli):
    path, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    row = {"task": "nli", "type": "classification", "label": "yes"}
    rows = [{**row, "prediction": p} for p in ("yes", "no")]
    code, result, _ = cli("tasks", "--data", write(path, rows), "--output", out)
    assert code == 0 and result["tasks"]["nli"]["accuracy"] == 0.5
    assert json.loads(out.read_text()) == result
    code, _, err = cli("tasks", "--data", write(path, [*rows, row]))
    assert code == 1 and "1 of 3 rows" in err and "answers.jsonl:3: " in err
    code, result, _ = cli("tasks", "--data", path, "--max_bad_fraction", 0.5)
    assert code == 0 and result["tasks"]["nli"]["rows"] == 2 and len(result["bad_rows"]) == 1


def test_text_command(tmp_path, cli, model_folder):
    path = tmp_path / "texts.jsonl"
    rows = [
        {"completion": "a b a b", "reference": "a b"},
        {"prediction": "c d", "reference": "c d"},
    ]
    model = ("--model", model_folder, "--dtype", "float32", "--device", "cpu", "--perplexity")
    code, result, _ = cli("text", "--data", write(path, rows), *model)
    assert code == 0 and result["exact_match"] == 0.5 and result["repetition"]["1"] == 0.25
    assert result["perplexity"] > 1 and result["texts"] == 2
    code, result, _ = cli("text", "--data", write(path, [{"prediction": "a"}]))
    assert code == 0 and "rouge_l" not in result
    code, _, err = cli("text", "--data", write(path, [{"prediction": "a"}, rows[0]]))
    assert code == 1 and "1 of 2 texts" in err
    write(path, [{"reference": "a"}])
    assert "prediction: Field required" in cli("text", "--data", path)[2]


def lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


@pytest.mark.slow
def test_killed_runs_go_on_and_score_the_same(tmp_path, cli, tiny):
    rng, data = random.Random(1), small_set(tmp_path / "x.jsonl", 4)
    flags = ("taco", "--data", data, *tiny, "--n_samples", 6, "--slots", 2, ALLOW)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(*flags, "--output", whole)[0] == 0
    for _ in range(2):  # each time after it has written a few lines more
        goal = lines(killed) + rng.randint(1, 12)
        process = Command("inference.evaluate", *flags, "--output", killed)
        while process.poll() is None and lines(killed) < goal:
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
    assert cli(*flags, "--output", killed)[0] == 0
    assert without_speed(killed) == without_speed(whole)
    assert (killed / "generations.json").read_bytes() == (whole / "generations.json").read_bytes()
    keys = [r["key"] for r in executed(killed)]
    assert len(keys) == len(set(keys)) == lines(whole) - 26  # nothing was lost, nothing made twice
