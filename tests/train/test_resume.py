"""A run that is resumed is the run that was never interrupted, whatever interrupted it."""

import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from head_helpers import (
    config,
    losses_of,
    require_same_tensors,
    rows_of,
    run_python,
    tiny_head,
    trained,
)
from transformers import AutoModelForCausalLM

from eagle.errors import EagleError
from train import runs
from train.head import loop, setup
from train.head import state as disk
from train.head.accumulate import Accumulator
from train.main import run

FEW = {"num_prompts": 1, "max_new_tokens": 4}
FIVE = {"max_steps": 5, "save_every": 1, "save_total_limit": 9, "eval_every": 2, "eval": FEW}
CLOCKS = ("elapsed", "seconds", "tokens_per_second", "steps_per_second")


def timeless(value):
    """Without what a clock says."""
    if isinstance(value, list):
        return [timeless(v) for v in value]
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return value


def require_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, generators, metrics, evaluations and the best: bit for bit."""
    last = f"checkpoints/{runs.checkpoints(a)[-1].name}"
    for name in ("head/model", f"{last}/state", f"{last}/head/model"):
        require_same_tensors(a / f"{name}.safetensors", b / f"{name}.safetensors")
    assert timeless(rows_of(a)) == timeless(rows_of(b))
    assert (a / "checkpoints/best").read_text() == (b / "checkpoints/best").read_text()
    left, right = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    for key in ("evaluations", "best", "final", "steps", "rows_seen"):
        assert timeless(left[key]) == timeless(right[key]), key


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """Five steps, each saved, every second one evaluated."""
    return trained(base, data, tmp_path_factory.mktemp("runs") / "whole", **FIVE)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(base, data, tmp_path):
    more = {"max_steps": 40, "save_every": 1, "eval_every": 10, "lr": 3e-3, "log_every": 3}
    more |= {"optimizer": "muon", "dtype": "bf16", "batch_size": 2, "eval": FEW}
    file = tmp_path / "config.json"
    file.write_text(config(base, data, tmp_path / "run", **more).model_dump_json())
    done = run_python(Path(__file__).with_name("killed_runs.py"), file, 6, 4)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["moments"]) == 6 and 0 < max(found["steps"]) < 40
    require_same_run(tmp_path / "run", tmp_path / "run-killed")
    assert not list((tmp_path / "run-killed/checkpoints").glob("damaged-*"))


def test_a_run_has_the_dtype_of_its_first_machine_and_says_so(base, data, tmp_path, monkeypatch):
    bf16_base = tmp_path / "base"  # the tiny target as most are published
    shutil.copytree(base, bf16_base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(bf16_base)
    more = {"max_steps": 2, "dtype": "auto", "model": {"dtype": "auto"}, "save_every": 1}

    def recorded(run_folder):
        names = ("run.json", "config.yaml", "head/eagle.json")
        card, cfg, head = (yaml.safe_load((run_folder / name).read_text()) for name in names)
        heads = card["dtype"], cfg["train"]["dtype"], head["training"]["dtype"]
        return {*heads}, {card["target"]["dtype"], cfg["model"]["dtype"], head["target"]["dtype"]}

    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: True)
    first = trained(bf16_base, data, tmp_path / "run", **more)
    assert recorded(first) == ({"bf16"}, {"bfloat16"})
    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: False)
    more["resume"] = str(first / "checkpoints/step-1")
    assert recorded(trained(bf16_base, data, tmp_path / "on", **more)) == ({"bf16"}, {"bfloat16"})
    more["dtype"] = "fp32"
    with pytest.raises(EagleError, match="train.dtype=bf16, not fp32; leave train.dtype"):
        run(config(bf16_base, data, tmp_path / "no", **more), quiet=True)


def save(output: Path, step: int) -> None:
    head = tiny_head(seed=step)
    weights = {n: p.detach() for n, p in head.named_parameters()}
    vocabulary = {"draft_ids": head.draft_token_ids()}
    info = {"step": step, "identity": {}}
    state = disk.TrainState(info, weights, {}, disk.rng_state(), vocabulary)
    disk.save_checkpoint(output, state, head, {"training": {"step": step}})


def killed_at(operation: int, work) -> bool:
    """Run `work` in a process that is killed before its file operation number `operation`; False
    when it has fewer."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()

        def counted(original):
            def run(*args, **kwargs):
                if next(calls) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return run

        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
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
    """Killed before each file operation of a save in turn: saving, pointing, removing an old."""
    before, reached = tmp_path / "before", set()
    for step in (1, 2):
        save(before, step)
    for again in (3, 2):  # a new checkpoint, and one in the place of an old
        for moment in itertools.count():
            output = tmp_path / f"run-{again}-{moment}"
            shutil.copytree(before, output)

            def work(output=output, again=again):
                save(output, again)
                runs.prune(output, 2)

            killed = killed_at(moment, work)
            found = disk.find_checkpoint(output, "auto")
            assert found.info["step"] in (2, again)
            assert not [*output.glob("checkpoints/damaged-*"), *output.glob("checkpoints/.step-*")]
            for path in runs.checkpoints(output):
                disk.load_checkpoint(path)
            reached.add(found.info["step"])
            if not killed:
                break
        assert moment > 12, "the kills did not reach the save"
    assert reached == {2, 3}


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other"])
def test_a_damaged_checkpoint_is_set_aside_and_told(tmp_path, caplog, file, damage):
    for step in (2, 4):
        save(tmp_path, step)
    path = tmp_path / "checkpoints/step-4" / file
    content = path.read_bytes()
    flipped = bytes([content[-9] ^ 0x10])
    torn = {"cut": content[: len(content) // 2], "other": b"{}"}
    torn["flipped"] = content[:-9] + flipped + content[-8:]
    path.unlink() if damage == "gone" else path.write_bytes(torn[damage])
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
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    assert runs.pointed(tmp_path, "latest") == runs.checkpoints(tmp_path)[-1]
    assert disk.load_checkpoint(runs.checkpoints(tmp_path)[-1]).info["step"] == 1


def test_the_draft_vocabulary_is_the_checkpoint_s(whole, base, data, tmp_path, monkeypatch):
    """Whatever a later version would choose: a draft id means what it meant."""
    choose = setup.choose_draft_vocab
    monkeypatch.setattr(
        setup, "choose_draft_vocab", lambda counts, *rest: choose(counts[::-1].copy(), *rest)
    )
    checkpoint = str(whole / "checkpoints/step-2")
    again = trained(base, data, tmp_path / "again", resume=checkpoint, **FIVE)
    require_same_tensors(*(x / "checkpoints/step-5/state.safetensors" for x in (whole, again)))


def test_the_best_checkpoint_is_known_after_a_kill_before_its_pointer(whole, base, data, tmp_path):
    best = shutil.copytree(whole, tmp_path / "run") / "checkpoints/best"
    before = best.read_text()
    best.unlink()
    trained(base, data, tmp_path / "run", resume="auto", **FIVE)
    assert best.read_text() == before


def test_a_signal_saves_at_the_end_of_the_step(whole, base, data, tmp_path, monkeypatch):
    cut, more = tmp_path / "cut", {**FIVE, "save_every": 100}
    forward, passes = Accumulator.forward, []

    def and_then(self, *args):
        passes.append(1)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Accumulator, "forward", and_then)
        assert run(config(base, data, cut, **more), quiet=True) == 128 + signal.SIGINT
    assert runs.pointed(cut, "latest").name == "step-3" and not (cut / "summary.json").exists()
    trained(base, data, cut, resume="auto", **more)
    require_same_run(whole, cut)


def test_a_signal_before_the_first_step_saves_too(base, data, tmp_path, monkeypatch):
    evaluate, more = loop.Trainer._evaluate, {"max_steps": 2, "eval": FEW}

    def and_then(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_evaluate", and_then)
        assert run(config(base, data, tmp_path / "run", zero=1, **more), quiet=True) == 143
    assert runs.pointed(tmp_path / "run", "latest").name == "step-0"
    assert len(losses_of(trained(base, data, tmp_path / "run", resume="auto", **more))) == 2


def test_early_stopping_counts_evaluations_and_is_resumed(base, data, tmp_path):
    more = {"max_steps": 40, "eval_every": 1, "lr": 1e-12, "eval": FEW}

    def steps(patience, **resume):
        more["early_stopping_patience"] = patience
        output = trained(base, data, tmp_path / "run", **more, **resume)
        return [e["step"] for e in json.loads((output / "summary.json").read_text())["evaluations"]]

    assert steps(2) == [0, 1, 2, 3]  # the first is the best, two do not better it
    assert steps(2, resume="auto") == [0, 1, 2, 3]
    assert steps(3, resume="auto") == [0, 1, 2, 3, 4]
