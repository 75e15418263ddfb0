"""`make demo` in miniature: the same steps, seconds instead of minutes."""

import json

import pytest

from examples import demo, steps


@pytest.mark.slow
def test_demo_trains_benchmarks_and_says_where(called, tmp_path, capsys, monkeypatch):
    def two_steps(command):
        more = ["train.max_steps=2", "train.batch_size=2"] if command[0] == "train.main" else []
        return steps.call([*command, *more])

    monkeypatch.setattr(demo, "call", two_steps)
    output = tmp_path / "demo"
    assert demo.demo(output=str(output), num_prompts=1) == 0
    modules = [command[0] for command in called]
    assert modules == ["train.inspect", "train.main", "inference.bench"]
    summary = json.loads((output / "head/summary.json").read_text())
    result = json.loads((output / "bench.json").read_text())
    assert summary["tau_before"] >= 1.0
    assert {r["engine"] for r in result["runs"]} == {"hf", "vanilla", "eagle"}
    assert not any(result["warm_up_s"].values())  # nothing is compiled
    assert all(result["identical"].values())
    assert (output / "head/head/model.safetensors").exists()
    assert "identical output: yes" in capsys.readouterr().out
