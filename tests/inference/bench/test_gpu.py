"""The GPU suite at toy size on a CPU: it runs on a bare machine, writes what docs/gpu.md says, and
its fixed-shape cycle makes the engine's tokens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.bench.gpu import correctness, engine
from inference.bench.gpu.__main__ import STAGES, main
from inference.bench.gpu.clock import union
from inference.bench.gpu.record import FAIL, OPEN, PASS, Goal, Record, summarise
from inference.bench.gpu.sizes import FULL, SMALL, TOY
from inference.bench.gpu.training import rates

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# what a GPU machine with torch, transformers, triton and pydantic need not have
BARE = """
import sys
absent = {"fire", "deepspeed", "datasets", "bitsandbytes", "trl", "omegaconf", "tensorboardX"}
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        gone = name.split(".")[0] in absent
        return None if gone else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import socket
def refuse(*args): raise OSError("no network")
socket.socket.connect = refuse
from inference.bench.gpu.__main__ import main
code = main(sys.argv[1:])
assert not absent & {name.split(".")[0] for name in sys.modules}
sys.exit(code)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The folder that the whole suite leaves on a machine without the rest."""
    out = tmp_path_factory.mktemp("suite")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BARE,
            "--size",
            "toy",
            "--device",
            "cpu",
            "--out",
            str(out),
            "--revision",
            "abc",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_every_stage_runs_on_a_bare_machine(bare):
    for stage in STAGES:
        data = json.loads((bare / f"{stage}.json").read_text())
        failed = [case for case in data["cases"] if "error" in case or "skipped" in case]
        assert data["cases"] and not failed, failed[:2]
        assert data["complete"] and data["stage"] == stage and data["size"] == "toy"
        assert data["environment"]["git_commit"] == "abc" and "driver" in data["environment"]
        assert data["goals"] and all(goal["verdict"] == OPEN for goal in data["goals"])
    summary = json.loads((bare / "summary.json").read_text())
    assert set(summary["stages"]) == set(STAGES)
    assert len(summary["goals"]) == 15


def test_kernels_are_right_and_timed(bare):
    cases = json.loads((bare / "correctness.json").read_text())["cases"]
    assert {case["kind"] for case in cases} == {
        "tree_attention",
        "commit_kv",
        "choose",
        "draft_loss",
        "lossless",
    }
    assert all(case["right"] for case in cases)
    cases = json.loads((bare / "kernels.json").read_text())["cases"]
    for case in cases:
        if case["kind"] == "tree_attention":
            assert case["errors"] == {} and all(ms > 0 for ms in case["ms"].values())


def test_the_step_of_a_head_is_left_out_with_a_reason(bare):
    cases = json.loads((bare / "training.json").read_text())["cases"]
    (step,) = [case for case in cases if case["kind"] == "step"]
    assert "deepspeed" in step["not_measured"]


def test_what_is_written_is_documented(bare):
    """Every field of every case, by kind, and every goal, stands in docs/gpu.md."""
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "gpu.md").read_text("utf-8")))
    for stage in STAGES:
        data = json.loads((bare / f"{stage}.json").read_text())
        written = set(data) | {key for case in data["cases"] for key in case}
        written |= {case["kind"] for case in data["cases"]} | {k for g in data["goals"] for k in g}
        assert written <= documented, (stage, sorted(written - documented))


def test_a_wrong_kernel_is_found(monkeypatch):
    right = correctness.attention(TOY, torch.float32, 3, 300, 13, CPU)
    assert right["right"]
    exact = correctness.tree_attention
    monkeypatch.setattr(correctness, "tree_attention", lambda *a, **k: exact(*a, **k) * 1.01)
    wrong = correctness.attention(TOY, torch.float32, 3, 300, 13, CPU)
    assert not wrong["right"] and wrong["relative_error"] == pytest.approx(0.01, rel=0.1)
    (goal,) = correctness.goals([{"kind": "x", **wrong}, {"kind": "x", **right}], CUDA)
    assert goal.value == 1 and goal.verdict == FAIL
    (goal,) = correctness.goals([{"kind": "x", **right}], CUDA)
    assert goal.verdict == PASS
    (goal,) = correctness.goals([{"kind": "x", **right}, {"kind": "x", "skipped": "late"}], CUDA)
    assert goal.verdict == OPEN


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path):
    record = Record("engine", "toy", tmp_path, CPU, budget_s=60)

    def broken():
        raise RuntimeError("no such\nkernel")

    record.run("a", {"rows": 1}, broken)
    record.run("b", {}, lambda: {"ms": 2.0})
    saved = json.loads(record.path.read_text())  # before the stage is over
    assert saved["cases"][0]["error"] == "RuntimeError: no such kernel"
    assert saved["cases"][0]["where"].startswith("tests/inference/test_gpu_suite.py:")
    assert saved["cases"][1]["ms"] == 2.0 and not saved["complete"]
    record.budget_s = 0
    record.run("c", {}, broken)
    assert "budget" in record.data["cases"][2]["skipped"]
    assert not record.finish([])["complete"]
    assert summarise(tmp_path)["stages"]["engine"]["failed"] == 1


def test_goals_hold_or_not():
    assert Goal.judge("x", 1.05, CUDA, most=1.1).verdict == PASS
    assert Goal.judge("x", 1.2, CUDA, most=1.1).verdict == FAIL
    assert Goal.judge("x", 0.6, CUDA, least=0.7).verdict == FAIL
    assert Goal.judge("x", None, CUDA, least=0.7).verdict == OPEN
    assert Goal.judge("x", 1.05, CPU, most=1.1).verdict == OPEN


def test_the_engines_goals():
    here = {"rows": 1, "context": 2048, "capacity": 4096}
    cycle = {
        "kind": "full_cycle",
        **here,
        "tree": "60,7,10",
        "graphed_ms": 6.0,
        "eager_ms": 30.0,
        "graphed_vs_floor": 1.7,
    }
    host = {
        "kind": "host",
        **here,
        "tree": "60,7,10",
        "graphed_outside_kernels": 0.01,
        "eager_outside_kernels": 0.8,
        "eager_synchronisations": 1,
    }
    cases = [
        {"kind": "plain", **here, "graphed_ms": 4.0},
        {"kind": "plain", "rows": 2, "graphed_ms": 9.0},
        {"kind": "verification", **here, "nodes": 64, "graphed_ms": 4.2},
        host,
        cycle,
        {**cycle, "capacity": 65536, "graphed_ms": 6.06, "eager_ms": 33.0},
        {**cycle, "tree": "8,4,2", "graphed_ms": 5.0},
        {"kind": "automatic", "rows": 32, "vs_graphed_plain": 1.01},
    ]
    found = {goal.name: goal for goal in engine.goals(cases, FULL, CUDA)}
    verdicts = {name: (round(goal.value, 3), goal.verdict) for name, goal in found.items()}
    assert verdicts == {
        "verification of 64 nodes / graphed plain step": (1.05, PASS),
        "host waits a cycle, the engine": (1, PASS),
        "full cycle 60,7,10 / its bandwidth floor, graphed": (1.7, FAIL),
        "share of a cycle outside kernels, the engine": (0.8, FAIL),
        "share of a cycle outside kernels, graphed": (0.01, PASS),
        "efficiency at batch 1, best tree, the engine": (0.133, FAIL),
        "efficiency at batch 1, best tree, graphed": (0.8, PASS),
        "cycle at the largest capacity / at the smallest, off 1 by, the engine": (0.1, FAIL),
        "cycle at the largest capacity / at the smallest, off 1 by, graphed": (0.01, PASS),
        'speedup at batch 32, tree="auto", over graphed plain': (1.01, PASS),
    }
    assert all(goal.value is None for goal in engine.goals([], FULL, CUDA))


def test_overlapping_kernels_count_once():
    assert union([(0, 2), (1, 3), (1.5, 2), (5, 6)]) == 4
    assert union([]) == 0


def test_a_runs_rates_leave_the_first_line_out():
    lines = [
        {"step": i, "tokens_per_second": n, "memory": {"resident": 2 * n}}
        for i, n in enumerate((1, 10, 30))
    ]
    found = rates("\n".join(map(json.dumps, lines)))
    assert found["tokens_per_second"] == 20 and found["memory.resident"] == 40
    with pytest.raises(ValueError, match="too few lines"):
        rates(json.dumps(lines[0]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "full", "--device", "cpu"], "full size needs a GPU"),
        (["--size", "toy", "--device", "meta"], "use cuda or cpu"),
        (["--size", "toy", "--device", "cpu", "--budget_s", "0"], "above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_budget_ends_a_stage(capsys, tmp_path):
    code = main(
        [
            "--stage",
            "training",
            "--size",
            "toy",
            "--device",
            "cpu",
            "--budget_s",
            "1e-9",
            "--out",
            str(tmp_path),
        ]
    )
    data = json.loads((tmp_path / "training.json").read_text())
    assert code == 0 and not data["complete"] and all("skipped" in c for c in data["cases"])


def test_sizes_name_what_the_goals_ask():
    """Full size has the settings that the goals are about, and toy size the same stages."""
    assert 64 in FULL.verify_nodes and FULL.trees[0] == "60,7,10" and 32 in FULL.engine_batches
    assert FULL.capacities == (4096, 65536) and FULL.context <= 2048
    assert FULL.loss[-1] == FULL.model.vocab == 128256
    assert SMALL.name == "toy"
