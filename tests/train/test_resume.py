"""A run that is resumed is the run that was never interrupted, whatever interrupted it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from head_helpers import config, losses_of, rows_of, tiny_head
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eagle.checkpoint import load_head
from eagle.errors import EagleError
from train import runs
from train.head import loop, setup
from train.head import state as disk
from train.head.accumulate import Accumulator
from train.main import run

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CLOCKS = ("elapsed", "seconds", "tokens_per_second", "steps_per_second")


def require_same_files(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    different = [k for k in left if not torch.equal(left[k], right[k])]
    assert not different, different


def timeless(value):
    """Without what a clock says."""
    if isinstance(value, list):
        return [timeless(v) for v in value]
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return value


def require_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, generators, metrics, evaluations and the choice of the best: bit for
    bit.
    """
    require_same_files(a / "head/model.safetensors", b / "head/model.safetensors")
    last = runs.checkpoints(a)[-1].name
    for name in ("state.safetensors", "head/model.safetensors"):
        require_same_files(a / "checkpoints" / last / name, b / "checkpoints" / last / name)
    assert timeless(rows_of(a)) == timeless(rows_of(b))
    assert (a / "checkpoints/best").read_text() == (b / "checkpoints/best").read_text()
    left, right = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    for key in ("evaluations", "best", "final", "steps", "rows_seen"):
        assert timeless(left[key]) == timeless(right[key]), key


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(base, data, tmp_path):
    cfg = config(
        base,
        data,
        tmp_path / "run",
        max_steps=60,
        save_every=1,
        eval_every=10,
        lr=3e-3,
        log_every=3,
        optimizer="muon",
        dtype="bf16",
        batch_size=2,
        eval={"num_prompts": 1, "max_new_tokens": 6},
    )
    file = tmp_path / "config.json"
    file.write_text(cfg.model_dump_json())
    command = [sys.executable, str(ROOT / "tests/train/killed_runs.py"), str(file), "10", "4"]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["moments"]) == 10 and 0 < max(found["steps"]) < 60
    require_same_run(tmp_path / "run", tmp_path / "run-killed")
    assert not list((tmp_path / "run-killed/checkpoints").glob("damaged-*"))


@pytest.fixture(scope="session")
def bf16_base(base, tmp_path_factory):
    """The tiny target as most are published."""
    folder = tmp_path_factory.mktemp("bf16") / "base"
    shutil.copytree(base, folder)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fast, dtype, other", [(True, "bf16", "fp32"), (False, "fp32", "bf16")])
def test_a_run_has_the_dtype_of_its_first_machine_and_says_so(
    bf16_base, data, tmp_path, monkeypatch, fast, dtype, other
):
    target = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    more = {"max_steps": 2, "dtype": "auto", "model": {"dtype": "auto"}, "save_every": 1}

    def recorded(folder):
        card, settings = (
            yaml.safe_load((folder / n).read_text()) for n in ("run.json", "config.yaml")
        )
        _, provenance = load_head(folder / "head")
        return (
            card["dtype"],
            card["target"]["dtype"],
            settings["train"]["dtype"],
            settings["model"]["dtype"],
            provenance["training"]["dtype"],
            provenance["target"]["dtype"],
        )

    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: fast)
    assert run(config(bf16_base, data, tmp_path / "run", **more), quiet=True) == 0
    assert recorded(tmp_path / "run") == (dtype, target) * 3
    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: not fast)
    first = str(tmp_path / "run" / "checkpoints" / "step-1")
    assert run(config(bf16_base, data, tmp_path / "on", resume=first, **more), quiet=True) == 0
    assert recorded(tmp_path / "on") == (dtype, target) * 3
    with pytest.raises(
        EagleError, match=f"train.dtype={dtype}, not {other}; leave train.dtype out"
    ):
        run(
            config(bf16_base, data, tmp_path / "no", resume=first, **{**more, "dtype": other}),
            quiet=True,
        )


def state_at(step: int, seed: int = 0) -> disk.TrainState:
    head = tiny_head(seed=step)
    info = {"step": step, "rows_seen": step, "elapsed": 0.0, "evaluations": [], "identity": {}}
    weights = {n: p.detach() for n, p in head.named_parameters()}
    vocabulary = {"draft_ids": head.draft_token_ids()}
    return disk.TrainState(info, weights, {}, disk.rng_state(), vocabulary)


def save(output: Path, step: int) -> None:
    disk.save_checkpoint(output, state_at(step), tiny_head(seed=step), {"training": {"step": step}})


OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def killed_at(operation: int, work) -> bool:
    """Run `work` in a process that is killed before its file operation number `operation`; False
    when it has fewer."""
    pid = os.fork()
    if pid == 0:
        left = [operation]

        def counted(original):
            def run(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return original(*args, **kwargs)

            return run

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def test_no_moment_of_saving_leaves_a_checkpoint_that_cannot_be_loaded(tmp_path):
    """Killed before each file operation of a save in turn: saving, pointing, and removing an old
    one.
    """
    before = tmp_path / "before"
    for step in (1, 2):
        save(before, step)
    moments, reached = 0, set()
    for again in (3, 2):  # a new checkpoint, and one in the place of an old
        while True:
            output = tmp_path / f"run-{again}-{moments}"
            shutil.copytree(before, output)

            def work(output=output, again=again):
                save(output, again)
                runs.prune(output, 2)

            killed = killed_at(moments, work)
            found = disk.find_checkpoint(output, "auto")
            assert found.info["step"] in (2, again)
            assert not list(output.glob("checkpoints/damaged-*"))
            for path in runs.checkpoints(output):
                disk.load_checkpoint(path)
            reached.add(found.info["step"])
            if not killed:
                break
            moments += 1
        assert moments > 12, "the kills did not reach the save"
        moments = 0
    assert reached == {2, 3}


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other"])
def test_a_damaged_checkpoint_is_set_aside_and_told(tmp_path, caplog, file, damage):
    for step in (2, 4):
        save(tmp_path, step)
    path = tmp_path / "checkpoints/step-4" / file
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-9] ^= 0x10
        path.write_bytes(content)
    elif damage == "other":
        path.write_text("{}")
    else:
        path.unlink()
    assert disk.find_checkpoint(tmp_path, "auto").info["step"] == 2
    if (file, damage) == ("state.json", "gone"):  # written last: it was never a checkpoint
        return
    assert "step-4" in caplog.text and "cannot be read" in caplog.text
    assert (tmp_path / "checkpoints/damaged-step-4").is_dir()
    assert runs.checkpoints(tmp_path) == [tmp_path / "checkpoints/step-2"]


def test_without_any_readable_checkpoint_nothing_is_begun_anew(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoints/step-2/state.safetensors").write_bytes(b"torn")
    for _ in range(2):  # and not at the second try either
        with pytest.raises(EagleError, match="no checkpoint of .* can be read; start a new run"):
            disk.find_checkpoint(tmp_path, "auto")


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones(tmp_path, caplog):
    for step in (2, 4, 6):
        save(tmp_path, step)
    found = disk.find_checkpoint(tmp_path, str(tmp_path / "checkpoints/step-2"))
    assert found.info["step"] == 2
    assert runs.checkpoints(tmp_path) == [tmp_path / "checkpoints/step-2"]
    assert {p.name for p in tmp_path.glob("checkpoints/left-*")} == {"left-step-4", "left-step-6"}
    assert "goes on from step-2" in caplog.text
    save(tmp_path / "other", 3)
    disk.find_checkpoint(tmp_path / "new", str(tmp_path / "other/checkpoints/step-3"))
    folder = tmp_path / "other/checkpoints"  # another run is only read, whatever is wrong with it
    save(tmp_path / "other", 5)
    (folder / "step-5/state.safetensors").write_bytes(b"torn")
    (folder / ".step-7.tmp-999999999").mkdir()
    before = sorted(folder.rglob("*"))
    found = disk.find_checkpoint(tmp_path / "new", str(tmp_path / "other"))
    assert found.info["step"] == 3 and sorted(folder.rglob("*")) == before


def require_intact(output: Path) -> int:
    """Every checkpoint loads, and nothing half-written stays; returns the last step."""
    assert not list((output / "checkpoints").glob(".step-*"))
    return [disk.load_checkpoint(path).info["step"] for path in runs.checkpoints(output)][-1]


def test_a_file_that_may_not_grow_is_told(tmp_path):
    """The quota of a user, here of this process."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(EagleError, match="cannot write to .*--resume"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert require_intact(tmp_path) == 1
    assert (tmp_path / "checkpoints/latest").read_text() == "step-1\n"


def test_the_draft_vocabulary_is_the_checkpoint_s(base, data, tmp_path, monkeypatch):
    """Whatever a later version would choose: a draft id means what it meant."""
    more = {"max_steps": 4, "save_every": 2, "save_total_limit": 9}
    assert run(config(base, data, tmp_path / "run", **more), quiet=True) == 0
    choose = setup.choose_draft_vocab
    monkeypatch.setattr(
        setup, "choose_draft_vocab", lambda counts, *rest: choose(counts[::-1].copy(), *rest)
    )
    start = str(tmp_path / "run/checkpoints/step-2")
    assert run(config(base, data, tmp_path / "again", resume=start, **more), quiet=True) == 0
    require_same_files(
        tmp_path / "run/head/model.safetensors", tmp_path / "again/head/model.safetensors"
    )


def test_the_best_checkpoint_is_known_after_a_kill_before_its_pointer(base, data, tmp_path):
    more = {"max_steps": 4, "save_every": 1, "eval_every": 2, "eval": {"num_prompts": 2}}
    assert run(config(base, data, tmp_path / "run", **more), quiet=True) == 0
    best = (tmp_path / "run/checkpoints/best").read_text()
    (tmp_path / "run/checkpoints/best").unlink()
    assert run(config(base, data, tmp_path / "run", resume="auto", **more), quiet=True) == 0
    assert (tmp_path / "run/checkpoints/best").read_text() == best


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step(base, data, tmp_path, number, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = {"max_steps": 5, "eval_every": 2, "eval": {"num_prompts": 1, "max_new_tokens": 4}}
    assert run(config(base, data, whole, **more), quiet=True) == 0
    forward, passes = Accumulator.forward, []

    def and_then(self, *args):
        passes.append(1)
        if len(passes) == 3:
            os.kill(os.getpid(), number)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Accumulator, "forward", and_then)
        assert run(config(base, data, cut, **more), quiet=True) == 128 + number
    assert runs.pointed(cut, "latest").name == "step-3" and not (cut / "summary.json").exists()
    assert run(config(base, data, cut, resume="auto", **more), quiet=True) == 0
    require_same_run(whole, cut)


def test_a_signal_before_the_first_step_saves_too(base, data, tmp_path, monkeypatch):
    more = {"max_steps": 2, "eval": {"num_prompts": 1, "max_new_tokens": 4}}
    evaluate = loop.Trainer._evaluate

    def and_then(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_evaluate", and_then)
        assert run(config(base, data, tmp_path / "run", zero=1, **more), quiet=True) == 143
    assert runs.pointed(tmp_path / "run", "latest").name == "step-0"
    assert run(config(base, data, tmp_path / "run", resume="auto", **more), quiet=True) == 0
    assert losses_of(tmp_path / "run") and len(rows_of(tmp_path / "run")) == 2


def test_early_stopping_counts_evaluations_and_is_resumed(base, data, tmp_path):
    more = {
        "max_steps": 40,
        "eval_every": 1,
        "early_stopping_patience": 2,
        "lr": 1e-12,
        "eval": {"num_prompts": 1, "max_new_tokens": 4},
    }
    assert run(config(base, data, tmp_path / "run", **more), quiet=True) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    # the first evaluation is the best, two do not better it
    assert summary["steps"] == 3 and [e["step"] for e in summary["evaluations"]] == [0, 1, 2, 3]
    assert run(config(base, data, tmp_path / "run", resume="auto", **more), quiet=True) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    more |= {"early_stopping_patience": 3, "resume": "auto"}
    assert run(config(base, data, tmp_path / "run", **more), quiet=True) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
