"""Whole runs on a tiny target: determinism, resume, ZeRO, ranks, the folder that is left."""

import errno
import json
import os
import platform
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from head_helpers import config, drafts_of, losses_of, rows_of, trained
from safetensors.torch import load_file

from configs.cli import main
from eagle.checkpoint import load_head
from eagle.errors import EagleError
from eagle.target import Target
from train import runs
from train.head.distributed import World
from train.main import run, train


@pytest.fixture(scope="module")
def plain_run(base, data, tmp_path_factory):
    """40 steps, evaluated before and after."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    more = {"max_steps": 40, "save_every": 5, "lr": 3e-3, "eval": {"num_prompts": 3}}
    more["data_more"] = {"on_policy": True}
    return trained(base, data, output, **more)


def test_a_run_leaves_head_metrics_and_summary(plain_run, base):
    head, provenance = load_head(plain_run / "head", Target.from_pretrained(base, dtype="float32"))
    assert head.config.draft_vocab_size == 128 and provenance["training"]["step"] == 40
    assert {"fingerprint", "id"} <= provenance["target"].keys() and provenance["tokenizer"]
    assert provenance["data"]["answers"] == "written by the target"
    rows = rows_of(plain_run)
    assert [r["step"] for r in rows] == list(range(1, 41))
    overlaps = [r["overlap_by_depth"][0] for r in rows]
    assert sum(overlaps[-5:]) > sum(overlaps[:5])
    shown = "loss accuracy_by_depth acceptance_by_depth tau_simulated lr grad_norm seconds"
    assert {*shown.split(), "tokens_per_second"} <= rows[-1].keys()
    assert rows[0]["lr"] < rows[1]["lr"] and rows[-1]["lr"] == pytest.approx(3e-4)
    summary = json.loads((plain_run / "summary.json").read_text())
    assert summary["steps"] == 40 and summary["draft_vocabulary"]["coverage"] > 0.9
    assert [e["step"] for e in summary["evaluations"]] == [0, 40] and summary["tau_after"] >= 1
    assert [p.name for p in runs.checkpoints(plain_run)] == ["step-35", "step-40"]
    assert (plain_run / "checkpoints" / "best").read_text().strip() == "step-40"


def test_zero_stages_agree_and_resume(base, data, tmp_path):
    """Full state on disk: each stage continues from the others' checkpoint. A head of two layers
    and all norms."""
    more = {"save_every": 2, "save_total_limit": 9}
    norms = dict.fromkeys(("norm_before_fc", "qk_norm", "norm_output"), True)
    more["model"] = {"num_layers": 2, **norms}
    found = [trained(base, data, tmp_path / f"zero{n}", zero=n, **more) for n in range(4)]
    losses, drafts = losses_of(found[0]), drafts_of(found[0] / "head", base)
    first, *others = ([row["grad_norm"] for row in rows_of(x)] for x in found)
    assert min(first) > 0 and all(norms == pytest.approx(first, rel=1e-3) for norms in others)
    for output in found:
        assert losses_of(output) == pytest.approx(losses, rel=1e-4)
        assert drafts_of(output / "head", base) == drafts
        assert load_head(output / "head")[0].config.num_layers == 2
    for zero, start in ((0, 3), (2, 0), (3, 1)):
        more["resume"] = str(found[start] / "checkpoints/step-2")
        again = trained(base, data, tmp_path / f"again{zero}", zero=zero, **more)
        assert losses_of(again) == pytest.approx(losses[2:], rel=1e-4)


def test_bf16_focal_muon_warm_start(plain_run, base, data, tmp_path):
    more = {"dtype": "bf16", "optimizer": "muon", "max_steps": 6, "grad_accum": 2}
    more["model"] = {"init_head": str(plain_run / "head"), "draft_vocab_size": None}
    output = trained(base, data, tmp_path / "warm", loss={"name": "focal", "gamma": 2.0}, **more)
    before, after = (load_file(x / "head/model.safetensors") for x in (plain_run, output))
    assert torch.equal(before["d2t"], after["d2t"]) and after["fc.weight"].dtype == torch.bfloat16
    assert not torch.equal(before["fc.weight"].to(torch.bfloat16), after["fc.weight"])
    with pytest.raises(EagleError, match="train.zero=0"):
        run(config(base, data, tmp_path / "no", optimizer="muon", zero=2), quiet=True)
    assert not (tmp_path / "no").exists()


def test_without_clipping_the_norm_is_still_told(base, data, tmp_path):
    clipped, *free = (
        [row["grad_norm"] for row in rows_of(trained(base, data, tmp_path / name, **more))]
        for name, more in {
            "clipped": {"grad_clip": 0.1, "max_steps": 1, "lr": 1e-6},
            "free": {"grad_clip": 0.0, "max_steps": 1, "lr": 1e-6},
            "free2": {"grad_clip": 0.0, "max_steps": 1, "lr": 1e-6, "zero": 2},
        }.items()
    )
    assert min(clipped) > 0.1 and all(norms == pytest.approx(clipped, rel=1e-3) for norms in free)


def test_a_time_budget_ends_the_run(base, data, tmp_path):
    timed = {"max_steps": None, "time_budget_minutes": 0.03, "lr": 1e-3}
    assert rows_of(trained(base, data, tmp_path / "run", **timed))[-1]["lr"] < 0.5e-3
    with pytest.raises(EagleError, match="time_budget_minutes=1e-06 was over before the first"):
        trained(base, data, tmp_path / "none", **timed | {"time_budget_minutes": 1e-6})
    assert not (tmp_path / "none/head").exists()


def test_folders_are_never_mixed_up(plain_run, base, data, tmp_path, monkeypatch):
    with pytest.raises(EagleError, match="--resume, or choose another --output"):
        run(config(base, data, plain_run), quiet=True)
    with pytest.raises(EagleError, match="belongs to a run with"):
        run(config(base, data, plain_run, resume="auto", seed=5), quiet=True)
    with pytest.raises(EagleError, match="no checkpoint there"):
        run(config(base, data, tmp_path / "x", resume=str(tmp_path)), quiet=True)
    earlier, now = ({"target": [weights, None, "none"]} for weights in ("f" * 64, "2:ff"))
    with pytest.raises(EagleError, match="an earlier version.*start a new run"):
        runs.require_same_run(plain_run, earlier, now)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/head-fim/head").mkdir(parents=True)
    assert runs.choose_output(None, "head-fim", None) == Path("runs/head-fim-2")
    assert runs.choose_output(None, "head-fim", "auto") == Path("runs/head-fim")


def test_a_folder_has_one_writer(tmp_path, monkeypatch, caplog):
    """However it ends; and the default names of two runs that begin together differ."""
    monkeypatch.chdir(tmp_path)

    def claim(output=None, resume=None):
        return runs.claimed(World(0, 1, torch.device("cpu")), output, "sft", resume)

    with claim() as first, claim() as second:
        assert [first, second] == [Path("runs/sft"), Path("runs/sft-2")]
        named = f"runs/sft is being written by process {os.getpid()} on {platform.node()}, since"
        with pytest.raises(EagleError, match=f"{named}.*choose another --output"), claim(first):
            pass
    assert not [*Path("runs").glob("*/*")]
    if (pid := os.fork()) == 0:
        with claim("a"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"process {pid}" in Path("a", runs.LOCK).read_text()
    with claim("a"):
        pass
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
    with claim("a"):
        assert "the disk of a has no locks (No locks available): let no" in caplog.text


def test_short_runs_and_other_steps_when_resumed(base, data, tmp_path):
    more = {"lr": 1e-3, "min_lr_ratio": 0.0}
    assert rows_of(trained(base, data, tmp_path / "one", max_steps=1, **more))[0]["lr"] == 1e-3
    on = {"ttt_steps": 2, "max_steps": 3, "resume": "auto"}
    last = rows_of(trained(base, data, tmp_path / "one", **on))[-1]
    assert last["step"] == 3 and len(last["overlap_by_depth"]) == 2


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train.max_step=3"], "max_steps"),
        (["--base", "no/such/folder"], "no/such/folder"),
        (["--data", "no_such_file.jsonl"], "no_such_file.jsonl"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, base, capsys, arguments, named):
    output = tmp_path / "run"
    if "--base" not in arguments:
        arguments = ["--base", str(base), *arguments]
    with pytest.raises(SystemExit) as ended:
        main(train, ["--output", str(output), *arguments], name="train")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and len(said.strip().splitlines()) == 1 and named in said
    assert not output.exists()
