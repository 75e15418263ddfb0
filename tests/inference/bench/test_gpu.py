"""The GPU suite at toy size on a CPU: it runs, and writes what docs/gpu.md says."""

import json

import pytest
import torch
from engine_helpers import head_model, make_prompts, make_target

from eagle.static_cycle import StaticCycle
from inference.bench.gpu import STAGES, gpu
from inference.bench.timing import capture


def test_every_stage_runs(tmp_path, capsys):
    gpu(size="toy", device="cpu", out=str(tmp_path))
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    for stage, result in results.items():
        failed = [run for run in result["runs"] if "error" in run]
        assert result["runs"] and not failed, failed[:2]
        assert result["stage"] == stage and result["versions"]["torch"] == torch.__version__
        for run in result["runs"]:
            ms = run.get("ms", {})
            assert all(value > 0 for value in (ms.values() if isinstance(ms, dict) else [ms]))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["stage"] for run in summary["runs"]] == list(STAGES)
    (bench,) = [run for run in results["engine"]["runs"] if run["kind"] == "engines"]
    assert {run["engine"] for run in bench["runs"]} == {"hf", "vanilla", "eagle"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_cycle_in_a_graph_is_lossless(device):
    """Speculative tokens of the cycle that a CUDA graph holds are the engine's plain ones."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, prompts, new = head_model(make_target("llama"), "16,4,4"), make_prompts((9, 30, 3)), 24
    model.to(device)
    options = {"max_new_tokens": new, "eos_token_id": -1, "draft": False}
    expected = [row.tokens for row in model.generate(prompts, **options).rows]
    static = StaticCycle(model.target, model.drafter, len(prompts), 120, None)
    static.begin(prompts)
    step = capture(static.step, model.device)
    static.begin(prompts)  # the warm-up moved on
    rows = [[token] for token in static.root.tolist()]
    while min(map(len, rows)) < new:
        step()
        gained = zip(static.num_accepted.tolist(), static.tokens.tolist(), strict=True)
        for row, (count, tokens) in zip(rows, gained, strict=True):
            row += tokens[: count + 1] if len(row) < new else []
    assert [row[:new] for row in rows] == expected
