"""Whole runs on a tiny target: determinism, resume, ZeRO, ranks, the folder that is left."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import Command
from head_helpers import config, drafts_of, losses_of, rows_of
from safetensors.torch import load_file

from eagle.checkpoint import load_head
from eagle.errors import EagleError
from eagle.target import Target
from train import runs
from train.main import run

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def plain_run(base, data, tmp_path_factory):
    """40 steps, evaluated before and after."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    cfg = config(base, data, output, max_steps=40, save_every=5, lr=3e-3, eval={"num_prompts": 3})
    assert run(cfg, quiet=True) == 0
    return output


def test_a_run_leaves_head_metrics_and_summary(plain_run, base):
    head, provenance = load_head(plain_run / "head", Target.from_pretrained(base, dtype="float32"))
    assert head.config.draft_vocab_size == 128 and provenance["training"]["step"] == 40
    assert {"fingerprint", "id"} <= provenance["target"].keys() and provenance["tokenizer"]
    rows = rows_of(plain_run)
    assert [r["step"] for r in rows] == list(range(1, 41))
    overlaps = [r["overlap_by_depth"][0] for r in rows]
    assert sum(overlaps[-5:]) > sum(overlaps[:5])
    for name in (
        "loss",
        "accuracy_by_depth",
        "acceptance_by_depth",
        "tau_simulated",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "seconds",
    ):
        assert name in rows[-1]
    assert rows[0]["lr"] < rows[1]["lr"] and rows[-1]["lr"] == pytest.approx(3e-4)
    summary = json.loads((plain_run / "summary.json").read_text())
    assert summary["steps"] == 40 and summary["draft_vocabulary"]["coverage"] > 0.9
    assert [e["step"] for e in summary["evaluations"]] == [0, 40] and summary["tau_after"] >= 1
    assert [p.name for p in runs.checkpoints(plain_run)] == ["step-35", "step-40"]
    assert (plain_run / "checkpoints" / "best").read_text().strip() == "step-40"


def test_zero_stages_agree_and_resume(base, data, tmp_path):
    """Full state on disk: each stage continues from the others' checkpoint."""
    found, more = {}, {"max_steps": 4, "save_every": 2, "save_total_limit": 9}
    for zero in range(4):
        output = tmp_path / f"zero{zero}"
        assert run(config(base, data, output, zero=zero, **more), quiet=True) == 0
        found[zero] = losses_of(output)
        assert found[zero] == pytest.approx(found[0], rel=1e-4)
        norms = [[r["grad_norm"] for r in rows_of(x)] for x in (output, tmp_path / "zero0")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3) and min(norms[0]) > 0
        first, last = (
            load_file(x / "head" / "model.safetensors") for x in (tmp_path / "zero0", output)
        )
        assert first.keys() == last.keys()
        assert all(torch.equal(first[name], last[name]) for name in ("d2t", "t2d"))
        assert drafts_of(output / "head", base) == drafts_of(tmp_path / "zero0" / "head", base)
    for zero in range(4):
        again = tmp_path / f"again{zero}"
        start = tmp_path / f"zero{(zero + 1) % 4}" / "checkpoints" / "step-2"
        cfg = config(base, data, again, zero=zero, max_steps=4, resume=str(start))
        assert run(cfg, quiet=True) == 0
        assert losses_of(again) == pytest.approx(found[0][2:], rel=1e-4)


def test_bf16_focal_muon_warm_start(plain_run, base, data, tmp_path):
    output = tmp_path / "warm"
    cfg = config(
        base,
        data,
        output,
        dtype="bf16",
        optimizer="muon",
        max_steps=6,
        grad_accum=2,
        loss={"name": "focal", "gamma": 2.0},
        model={"init_head": str(plain_run / "head"), "draft_vocab_size": None},
    )
    assert run(cfg, quiet=True) == 0
    before, after = (
        load_file(folder / "head" / "model.safetensors") for folder in (plain_run, output)
    )
    assert torch.equal(before["d2t"], after["d2t"]) and after["fc.weight"].dtype == torch.bfloat16
    assert not torch.equal(before["fc.weight"].to(torch.bfloat16), after["fc.weight"])
    with pytest.raises(EagleError, match="train.zero=0"):
        run(config(base, data, tmp_path / "no", optimizer="muon", zero=2), quiet=True)
    assert not (tmp_path / "no").exists()


def test_without_clipping_the_norm_is_still_told(base, data, tmp_path):
    more = {"max_steps": 2, "lr": 1e-6}
    for name, clip, zero in (("clipped", 0.1, 0), ("free", 0.0, 0), ("free2", 0.0, 2)):
        cfg = config(base, data, tmp_path / name, zero=zero, grad_clip=clip, **more)
        assert run(cfg, quiet=True) == 0
    clipped, *free = (
        [row["grad_norm"] for row in rows_of(tmp_path / x)] for x in ("clipped", "free", "free2")
    )
    assert min(clipped) > 0.1 and all(norms == pytest.approx(clipped, rel=1e-3) for norms in free)


def test_a_time_budget_ends_the_run(base, data, tmp_path):
    cfg = config(base, data, tmp_path / "run", max_steps=None, time_budget_minutes=0.03)
    assert run(cfg, quiet=True) == 0
    assert rows_of(tmp_path / "run")[-1]["lr"] < 0.5 * cfg.train.lr


def test_folders_are_never_mixed_up(plain_run, base, data, tmp_path, monkeypatch):
    with pytest.raises(EagleError, match="--resume, or choose another --output"):
        run(config(base, data, plain_run), quiet=True)
    with pytest.raises(EagleError, match="belongs to a run with"):
        run(config(base, data, plain_run, resume="auto", seed=5), quiet=True)
    with pytest.raises(EagleError, match="no checkpoint there"):
        run(config(base, data, tmp_path / "x", resume=str(tmp_path)), quiet=True)
    monkeypatch.chdir(tmp_path)
    assert runs.choose_output(None, "head-fim", None) == Path("runs/head-fim")
    (tmp_path / "runs/head-fim/head").mkdir(parents=True)
    assert runs.choose_output(None, "head-fim", None) == Path("runs/head-fim-2")
    assert runs.choose_output(None, "head-fim", "auto") == Path("runs/head-fim")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train.max_step=3"], "max_steps"),
        (["--data_format", "poem"], "poem"),
        (["--base", "no/such/folder"], "no/such/folder"),
        (["--data", "no_such_file.jsonl"], "no_such_file.jsonl"),
    ],
    ids=["unknown-key", "unknown-format", "missing-model", "missing-data"],
)
def test_wrong_arguments_are_one_line(tmp_path, base, arguments, named):
    output = tmp_path / "run"
    if "--base" not in arguments:
        arguments = ["--base", str(base), *arguments]
    done = Command("train.main", "--output", output, *arguments).output()
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and named in done.stderr
    assert not output.exists()
