"""Evaluation from end to end, with programs that are really run: the shipped set, stages, kills,
refusals.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Command

from inference import evaluate
from inference.evaluation import journal
from inference.evaluation.executing import Executor, Rules
from inference.evaluation.generations import Generations, Sample, write_upstream
from inference.evaluation.problems import load_problems
from inference.evaluation.run import verify
from inference.evaluation.sandbox import Sandbox

ROOT = Path(__file__).parents[3]
ALLOW = "--allow_code_execution"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, allow_code_execution=True) as sandbox:
        yield sandbox


@pytest.fixture
def cli(in_process):
    """cli("taco", "--flag", …) -> (code, the JSON of the last line, stderr)."""

    def run(name, *arguments):
        command = evaluate.COMMANDS[name]
        preset = ("--format", name) if command is evaluate.code else ()
        code, out, err = in_process(command, *preset, *arguments)
        lines = out.splitlines()
        return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, err

    return run


def generations(path, problems, made):
    """made: {task: completions} -> an upstream file."""
    samples = [
        Sample(task, i, text) for task, texts in made.items() for i, text in enumerate(texts)
    ]
    write_upstream(path, problems.problems, Generations(samples))
    return path


@pytest.fixture(scope="module")
def shipped():
    return load_problems(None)


def test_the_shipped_solutions_pass(shipped, sandbox, tmp_path):
    with Executor(sandbox, tmp_path, Rules()) as executor:
        checked = verify(shipped, executor, tmp_path)
    assert checked.verified == [p.task_id for p in shipped.problems]
    assert checked.excluded == [] == checked.unverified and checked.isolation == sandbox.level


def test_scores_in_parallel_and_in_series(shipped, tmp_path, cli):
    right = {p.task_id: [p.solutions[-1], "print('no')"] for p in shipped.problems}
    file = generations(tmp_path / "right.json", shipped, right)
    reports = []
    for workers in (1, 2):
        stage = ("--generations", file, "--output", tmp_path / f"{workers}")
        code, summary, _ = cli("execute", *stage, ALLOW, "--workers", workers, "--seconds", 1)
        assert code == 0 and summary["programs"] == 40 and summary["causes"]["accepted"] == 20
        code, summary, _ = cli("score", *stage)
        assert code == 0 and summary["pass_at_k"]["pass@1"]["value"] == 0.5
        report = json.loads((tmp_path / f"{workers}" / "report.json").read_text())
        groups = [e["pass@1"]["value"] for g in report["splits"].values() for e in g.values()]
        assert set(groups) == {0.5}
        reports.append(report)
    assert reports[0] == reports[1]


# completions of known outcome
OUTCOMES = {
    "accepted": "print(2 * int(input()))",
    "wrong": "print(2 + int(input()))",
    "runtime_error": "print(2 * int(input()) // 0)",
    "compile_error": "print(2 *",
    "timeout": "while True: pass",
    "memory": "x = bytearray(1 << 31)",
}


def small_set(path, problems=2):
    """Problems "double" with 3 tests each, and completions of known outcome for them."""
    tests = {"inputs": ["1\n", "5\n", "7\n"], "outputs": ["2\n", "10\n", "14\n"]}
    rows = [
        {
            "task_id": f"double{i}",
            "question": "Double.",
            "solutions": json.dumps([OUTCOMES["accepted"]]),
            "input_output": json.dumps(tests),
            "difficulty": "EASY" if i % 2 else "HARD",
            "skill_types": "['Sorting']",
        }
        for i in range(problems)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_outcome_is_told_apart_and_stages_repeat_nothing(tmp_path, cli):
    data = small_set(tmp_path / "x.jsonl", 1)
    problems = load_problems(data)
    file = generations(tmp_path / "g.json", problems, {"double0": list(OUTCOMES.values())})
    stage = ("--data", data, "--output", tmp_path / "out")
    limits = ("--seconds", 0.5, "--memory_mb", 512)
    code, summary, _ = cli("execute", *stage, "--generations", file, ALLOW, *limits)
    assert code == 0 and summary["causes"] == dict.fromkeys(OUTCOMES, 1)
    lines = journal.read(tmp_path / "out" / "executions.jsonl")
    assert {x["verdict"]["isolation"] for x in lines} == {summary["isolation"]}
    again = cli("execute", *stage, "--generations", file, ALLOW, *limits)[1]
    assert again == summary and len(journal.read(tmp_path / "out" / "executions.jsonl")) == len(
        lines
    )
    code, scored, _ = cli("score", *stage, "--generations", file, "--k", "1,2,6")
    values = {k: v["value"] for k, v in scored["pass_at_k"].items()}
    assert values == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@6": 1.0}, abs=1e-6)
    assert scored["causes"] == summary["causes"]
    code, _, err = cli("score", *stage, "--generations", file, "--k", 7)
    assert code == 1 and "pass@7 needs at least 7" in err
    # another limit is another verdict
    cli("execute", *stage, "--generations", file, ALLOW, "--seconds", 0.6, "--memory_mb", 512)
    assert len(journal.read(tmp_path / "out" / "executions.jsonl")) == 2 * len(lines)


def test_a_problem_whose_own_solution_fails_is_excluded_and_listed(tmp_path, cli):
    data = small_set(tmp_path / "x.jsonl", 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["solutions"] = json.dumps(["print(1)", OUTCOMES["timeout"]])
    rows[2]["solutions"] = json.dumps(["print 1", OUTCOMES["accepted"]])  # one of them is enough
    rows[3]["solutions"] = "[]"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = ("--data", data, "--output", tmp_path / "out")
    code, summary, err = cli("verify-dataset", *stage, ALLOW, "--seconds", 0.5)
    assert code == 1 and summary["verified"] == 2 and summary["unverified"] == 1
    (row,) = summary["excluded"]
    assert row["task_id"] == "double1" and "timeout in test 1 of 3" in row["reason"]
    assert "excluded: double1" in err
    right = {f"double{i}": [OUTCOMES["accepted"]] for i in range(4)}
    file = generations(tmp_path / "g.json", load_problems(data), right)
    cli("execute", *stage, "--generations", file, ALLOW)
    code, scored, _ = cli("score", *stage, "--generations", file)
    assert scored["pass_at_k"]["pass@1"]["problems"] == 3
    page = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| double1 | its own solution: timeout" in page and "1, their tests taken as right" in page
    )


def test_a_broken_checker_is_no_fault_of_the_model(tmp_path, cli):
    data, file = small_set(tmp_path / "x.jsonl", 3), tmp_path / "checkers.py"
    file.write_text("CHECKERS = {'double1': lambda given, expected, got: 1 / 0}\n")
    problems, right = load_problems(data), OUTCOMES["accepted"]
    found = generations(
        tmp_path / "g.json", problems, {f"double{i}": [right] * 2 for i in range(3)}
    )
    stage = (
        "--data",
        data,
        "--checkers",
        file,
        "--output",
        tmp_path / "out",
        "--generations",
        found,
    )
    _, summary, _ = cli("execute", *stage, ALLOW)
    assert summary["causes"] == {"accepted": 4, "harness_error": 2}
    code, scored, _ = cli("score", *stage)
    assert code == 1 and scored["pass_at_k"] is None and "no score" in scored["refused"]
    assert not (tmp_path / "out" / "metrics.json").exists()
    # not even above the threshold is the problem dropped
    code, _, err = cli("score", *stage, "--max_harness_errors", 0.5)
    assert code == 1 and "double1 (0)" in err
    # repaired, only they are run again
    file.write_text(file.read_text().replace("1 / 0", "True"))
    before = len(journal.read(tmp_path / "out" / "executions.jsonl"))
    cli("execute", *stage, ALLOW)
    assert len(journal.read(tmp_path / "out" / "executions.jsonl")) == before + 1
    code, scored, _ = cli("score", *stage)
    assert code == 0 and scored["pass_at_k"]["pass@1"]["value"] == 1.0
    code, _, err = cli("verify-dataset", *stage[:6], ALLOW)
    assert code == 0


def test_harness_errors_are_tried_again(tmp_path, sandbox):
    problems = load_problems(small_set(tmp_path / "x.jsonl", 1))
    (problem,) = problems.problems
    program = OUTCOMES["accepted"]
    with Executor(sandbox, tmp_path, Rules()) as executor:
        executor.run([(problem, program), None, (problem, program)])
        assert executor.done == 2 and len(executor.verdicts) == 1
    path = tmp_path / "executions.jsonl"
    record = json.loads(path.read_text())
    record["verdict"]["status"] = "harness_error"
    path.write_text(json.dumps(record) + "\n")
    with Executor(sandbox, tmp_path, Rules()) as executor:
        executor.run([(problem, program)])
    assert [r["verdict"]["status"] for r in journal.read(path)] == ["harness_error", "accepted"]


HUMAN = {
    "task_id": "H/0",
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(0, 0) == 0\n",
}
BASIC = {
    "task_id": 2,
    "text": "Half.",
    "code": "def half(x):\n    return x / 2\n",
    "test_setup_code": "import math",
    "test_list": ["assert half(2) == 1", "assert math.isclose(half(1), 0.5)"],
}


def test_humaneval_and_mbpp_files(tmp_path, cli):
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps(HUMAN) + "\n" + json.dumps(BASIC) + "\n")
    made = {
        "H/0": [
            "    return a + b\n",
            "    print(a)\n    return a + b\n\nprint(add(1, 1))\n",
            "    return a - b\n",
            "    import sys\n    sys.exit(0)\n",
            "    return a +\n",
            "    return int(input())\n",
        ],
        "2": [
            BASIC["code"],
            "def half(x):\n    return x // 2\n",
            "half = 3",
            "def half(x:\n",
            "exit()",
            "x",
        ],
    }
    file = generations(tmp_path / "g.json", load_problems(data), made)
    stage = ("--data", data, "--output", tmp_path / "out")
    assert cli("verify-dataset", *stage, ALLOW)[1]["verified"] == 2
    _, summary, _ = cli("execute", *stage, "--generations", file, ALLOW)
    assert summary["causes"] == {"accepted": 3, "wrong": 4, "compile_error": 2, "runtime_error": 3}
    _, scored, _ = cli("score", *stage, "--generations", file)
    assert scored["pass_at_k"]["pass@1"]["value"] == pytest.approx((2 / 6 + 1 / 6) / 2)


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
    assert (
        sum(summary["causes"].values()) == 12
        and "generated 12/12" in err
        and "executed 12/12" in err
    )
    names = {
        "report.json",
        "report.md",
        "generations.json",
        "metrics.json",
        "dataset.json",
        "execution.json",
        "executions.jsonl",
    }
    assert names < {p.name for p in out.iterdir()}
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
    staged = without_speed(own)
    assert staged == report


def test_plain_and_speculative_side_by_side(tmp_path, cli, tiny):
    out = tmp_path / "out"
    flags = ("--data", small_set(tmp_path / "x.jsonl", 2), "--output", out, *tiny, "--n_samples", 3)
    code, result, _ = cli("taco", *flags, ALLOW, "--compare")
    assert code == 0 and result["agree"] and result["differing"] == 0 and result["programs"] == 6
    assert result["speed"]["vanilla"]["tau"] == 1.0 and result["vs_vanilla"] > 0
    assert (
        result["text"]["vanilla"] == result["text"]["eagle"]
        and "rouge_l" in result["text"]["eagle"]
    )
    assert (
        result["speed"]["eagle"]["cycles"] <= result["speed"]["vanilla"]["cycles"]
    )  # its head is random
    made = [(out / f"generations-{engine}.json").read_bytes() for engine in ("vanilla", "eagle")]
    assert made[0] == made[1]
    page = (out / "compare.md").read_text()
    assert "0 of 6 programs differ; pass@k is the same." in page
    # one program of one of the two changed afterwards: it is seen, and in float32 it is a failure
    paths = {journal.read(p)[0]["settings"]["engine"]: p for p in out.glob("generations-*.jsonl")}
    lines = paths["eagle"].read_text().splitlines()
    changed = json.loads(lines[1])
    changed["output"] += "x"
    paths["eagle"].write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")
    code, result, _ = cli("taco", *flags, ALLOW, "--compare")
    assert code == 1 and result["differing"] == 1 and not result["agree"]
    assert "1 of 6 programs differ" in (out / "compare.md").read_text()


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (("taco", "--n_samples", 2), "allow_code_execution"),
        (("execute", "--generations", "GENERATIONS"), "allow_code_execution"),
        (("verify-dataset",), "allow_code_execution"),
        (("taco", ALLOW, "--n_samples", 2, "--k", "1,5"), "pass@5 needs at least 5"),
        (("taco", ALLOW, "--k", "best"), "k 'best'"),
        (("taco", ALLOW, "--temperature", 0), "--n_samples 1"),
        (("taco", ALLOW, "--n_samples", 0), "n_samples: Input should be greater"),
        (("taco", ALLOW, "--policy", "kind"), "policy: Input should be"),
        (("taco", ALLOW, "--engine", "medusa"), "engine: Input should be"),
        (("taco", ALLOW, "--against", "absent.json"), "absent.json"),
        (("taco", ALLOW, "--isolation", "prison"), "isolation level"),
        (("taco", ALLOW, "--seconds", 0), "seconds: Input should be greater"),
        (("score", "--generations", "GENERATIONS"), "run the execute stage first"),
        (("execute", "--generations", "absent.json", ALLOW), "cannot read absent.json"),
        (("execute", ALLOW), "give --generations"),
        (("score",), "give --generations"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, cli, monkeypatch, arguments, wrong):
    import inference.generate

    monkeypatch.setattr(
        inference.generate, "load_model", lambda *_: pytest.fail("a model was loaded")
    )
    data = small_set(tmp_path / "x.jsonl")
    file = generations(
        tmp_path / "g.json", load_problems(data), {"double0": ["x"], "double1": ["x"]}
    )
    arguments = [file if a == "GENERATIONS" else a for a in arguments]
    code, _, err = cli(*arguments, "--data", data, "--output", tmp_path / "out")
    assert code == 1 and wrong in err and err.startswith("error: ") and err.count("\n") == 1


def test_score_wants_every_verdict(tmp_path, cli):
    data = small_set(tmp_path / "x.jsonl")
    problems = load_problems(data)
    file = generations(tmp_path / "g.json", problems, {"double0": ["x"], "double1": ["y"]})
    stage = ("--data", data, "--output", tmp_path / "out")
    cli("execute", *stage, "--generations", file, ALLOW)
    more = generations(tmp_path / "h.json", problems, {"double0": ["x"], "double1": ["z"]})
    code, _, err = cli("score", *stage, "--generations", more)
    assert code == 1 and "1 of 2 programs have no verdict" in err and "double1/0" in err


@pytest.mark.parametrize("arguments", [[], ["sonnets"], ["--help"]])
def test_unknown_commands_and_help(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments)
    assert "verify-dataset" in capsys.readouterr().out + str(ended.value)
    assert (ended.value.code == 0) == (arguments == ["--help"])


def test_tasks_command(tmp_path, cli):
    path, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    rows = [
        {"task": "nli", "type": "classification", "prediction": p, "label": "yes"}
        for p in ("yes", "no")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, result, _ = cli("tasks", "--data", path, "--output", out)
    assert (
        code == 0
        and result["tasks"]["nli"]["accuracy"] == 0.5
        and json.loads(out.read_text()) == result
    )
    path.write_text(path.read_text() + '{"task": "nli"}\n')
    code, _, err = cli("tasks", "--data", path)
    assert code == 1 and "1 of 3 rows" in err and "answers.jsonl:3: " in err
    code, result, _ = cli("tasks", "--data", path, "--max_bad_fraction", 0.5)
    assert code == 0 and result["tasks"]["nli"]["rows"] == 2 and len(result["bad_rows"]) == 1
    assert "give --data" in cli("tasks")[2]


def test_text_command(tmp_path, cli, model_folder):
    path = tmp_path / "texts.jsonl"
    rows = [
        {"completion": "a b a b", "reference": "a b"},
        {"prediction": "c d", "reference": "c d"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model", model_folder, "--dtype", "float32", "--device", "cpu", "--perplexity")
    code, result, _ = cli("text", "--data", path, *model)
    assert code == 0 and result["exact_match"] == 0.5 and result["repetition"]["1"] == 0.25
    assert result["perplexity"] > 1 and result["texts"] == 2
    path.write_text(json.dumps({"prediction": "a"}) + "\n")
    code, result, _ = cli("text", "--data", path)
    assert code == 0 and "rouge_l" not in result
    path.write_text(path.read_text() + json.dumps(rows[0]) + "\n")
    code, _, err = cli("text", "--data", path)
    assert code == 1 and "1 of 2 texts" in err
    path.write_text('{"reference": "a"}\n')
    assert "prediction: Field required" in cli("text", "--data", path)[2]


def lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


@pytest.mark.slow
def test_killed_runs_go_on_and_score_the_same(tmp_path, cli, tiny):
    rng, data = random.Random(1), small_set(tmp_path / "x.jsonl", 4)
    flags = ("taco", "--data", data, *tiny, "--n_samples", 6, "--slots", 2, ALLOW)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli(*flags, "--output", whole)[0] == 0
    for _ in range(3):  # each time after it has written a few lines more
        goal = lines(killed) + rng.randint(1, 12)
        process = Command("inference.evaluate", *flags, "--output", killed)
        while process.poll() is None and lines(killed) < goal:
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
    assert cli(*flags, "--output", killed)[0] == 0
    assert without_speed(killed) == without_speed(whole)
    assert (killed / "generations.json").read_bytes() == (whole / "generations.json").read_bytes()
    keys = [r["key"] for r in journal.read(killed / "executions.jsonl")]
    assert len(keys) == len(set(keys)) == lines(whole) - 26  # nothing was lost, nothing made twice


FULL = """
import resource, sys
from inference import evaluate
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
evaluate.main(sys.argv[2:])
"""


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, cli):
    data, out = small_set(tmp_path / "x.jsonl", 4), tmp_path / "out"
    made = {f"double{i}": [f"{OUTCOMES['accepted']} #{i}{j}" for j in range(5)] for i in range(4)}
    file = generations(tmp_path / "g.json", load_problems(data), made)
    arguments = ["execute", "--data", data, "--generations", file, "--output", out, ALLOW]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, "3000", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "free some space" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")
    kept = journal.read(out / "executions.jsonl")
    assert 5 <= len(kept) < 20
    assert cli(*arguments)[0] == 0
    assert journal.read(out / "executions.jsonl")[: len(kept)] == kept
    assert cli("score", *arguments[1:-1])[1]["pass_at_k"]["pass@1"]["value"] == 1.0
