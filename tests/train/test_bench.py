"""The training benchmark: arms that differ in speed or memory alone, and its JSON."""

import json
import math
from pathlib import Path

import pytest
from commands import run

from configs.cli import run as run_command
from inference.bench.train import bench

ROOT = Path(__file__).parents[2]
SMALL = ["train.batch_size=2", "train.ttt_steps=2", "data.max_length=64", "train.dtype=fp32"]


def test_the_command(tmp_path, base, data):
    command = ["inference.bench.train", "--base", base, "--data", data, *SMALL]
    command += ["data.min_supervised_tokens=1", "--arms", "fused,naive,recompute"]
    command += ["--steps", "1", "--repeats", "2", "--loss_vocab", "4096", "--loss_tokens", "512"]
    command += ["--loss_hidden", "16", "--json_path", tmp_path / "bench.json"]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "bench.json").read_text())
    loss, step = found["loss"], found["step"]
    assert loss["memory_ratio"] == loss["fused"]["peak_mib"] / loss["naive"]["peak_mib"] < 0.8
    gradient = 4096 * 16 * 4 / 2**20  # of the weight
    assert loss["fused"]["peak_mib"] > 2 * gradient
    arms = step["arms"]
    assert set(arms) == {"fused", "naive", "recompute"}
    assert set(step["ratios"]) == {"naive", "recompute"}
    for arm in arms.values():
        assert len(arm["turns"]) == 2 and len(arm["loss"]) == 2
        assert set(arm["seconds"]) >= {"data", "target", "head", "backward", "step"}
        # the same rows and updates, whatever the arm
        for one, other in zip(arm["loss"], arms["fused"]["loss"], strict=True):
            assert math.isclose(one, other, rel_tol=1e-3)
    assert arms["fused"]["loss"][0] != arms["fused"]["loss"][1]


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"arms": "fused,fast"}, "unknown fast; use some of fused, naive, compile, recompute"),
        ({"steps": 0}, "--steps=0: must be at least 1"),
        ({"loss_tokens": -5}, "--loss_tokens=-5: must be at least 1, or 0"),
        ({"json_path": "not/there/bench.json"}, "no such folder; make it first"),
    ],
)
def test_bad_input(capsys, flags, says):
    assert run_command(lambda: bench(**flags)) == 1
    assert says in capsys.readouterr().err
