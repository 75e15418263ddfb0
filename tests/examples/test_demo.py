"""`make demo` in miniature: the same steps, seconds instead of minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_demo_trains_benchmarks_and_says_where(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.demo",
            "--output",
            str(tmp_path / "demo"),
            "--minutes",
            "0.1",
            "--num_prompts",
            "1",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/head/summary.json").read_text())
    result = json.loads((tmp_path / "demo/bench.json").read_text())
    assert summary["steps"] > 0 and summary["tau_before"] >= 1.0
    assert {r["engine"] for r in result["runs"]} == {"hf", "vanilla", "eagle"}
    assert not any(result["warm_up_s"].values())  # nothing is compiled
    assert all(result["identical"].values())
    assert (tmp_path / "demo/head/head/model.safetensors").exists()
    assert "identical output: yes" in done.stdout
