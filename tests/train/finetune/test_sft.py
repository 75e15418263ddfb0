"""Supervised runs: what they leave behind, that they resume exactly, and that nothing tears
them.
"""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune_helpers import (
    ENV,
    ROOT,
    config,
    go,
    instructions,
    losses_of,
    rows_of,
    summary_of,
    write_lines,
)
from safetensors.torch import load_file

from configs.finetune_schema import LoraSection, PolicyConfig
from eagle.errors import EagleError
from eagle.loading import RECORD, WEIGHTS, read_record
from eagle.target import Target
from records import load_dataset_for, load_tokenizer
from train.finetune import checkpoints as disk
from train.finetune.__main__ import run
from train.finetune.assistant import card_records, read_shipped
from train.finetune.policy import base_fingerprint, build_policy
from train.finetune.sft import LabelCollator, token_loss
from train.head.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return instructions(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """Six steps with dropout, accumulation and checkpointing, saved and evaluated on the way."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return go("sft", base, data, output, **SIX)


SIX = {
    "train": {"max_steps": 6, "save_every": 2, "save_total_limit": 9, "grad_accum": 2},
    "lora": {"dropout": 0.1},
}


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_adapter_metrics_and_summary(whole, base, data):
    adapter, summary = whole / "adapter", summary_of(whole)
    names = {p.name for p in adapter.iterdir()}
    assert {WEIGHTS, "adapter_config.json", RECORD, "README.md", "tokenizer.json"} <= names
    assert (
        not {n for n in names if n.endswith((".pt", ".bin", ".pth"))}
        and "model.safetensors" not in names
    )
    assert summary["adapter_bytes"] < 200_000 and summary["peak_memory_mb"] > 10
    assert summary["trainable_parameters"] == sum(p.numel() for p in weights(adapter).values())
    assert 0 < summary["trainable_share"] < 0.5
    rows = rows_of(whole)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows_of(whole, evaluations=True)] == [0, 6]
    assert summary["heldout_after"]["loss"] < summary["heldout_before"]["loss"]
    record = read_record(adapter)
    assert record["base"] == {"id": str(base.resolve()), "fingerprint": base_fingerprint(str(base))}
    assert (
        record["quantization"] == "nf4"
        and record["data"]["rows"] + record["data"]["heldout_rows"] == 40
    )
    assert [p.name for p in disk.checkpoints(whole)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert all(p.dtype == torch.float32 for p in weights(adapter).values())


def test_the_adapter_loads_where_it_belongs(whole, base):
    """In peft, on a base in 4 bit and in full precision, and in the engine's target."""
    ids, logits = torch.arange(5, 25)[None], {}
    for quantization in ("nf4", "none"):
        policy = PolicyConfig(
            base=str(base), quantization=quantization, dtype="float32", compute="fp32"
        )
        model = build_policy(policy, LoraSection(), 0, whole / "adapter").eval()
        with torch.no_grad():
            logits[quantization] = model(input_ids=ids).logits
            with model.disable_adapter():
                assert (model(input_ids=ids).logits - logits[quantization]).abs().max() > 1e-3
    target = Target.from_pretrained(base, dtype="float32", adapter_path=str(whole / "adapter"))
    assert target.identity["adapter"] == read_record(whole / "adapter")["fingerprint"]
    with target.stock() as stock, torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, logits["none"], atol=1e-4)


def test_the_loss_is_over_supervised_tokens_however_they_are_batched(base, data, tmp_path):
    cfg = config("sft", base, data, tmp_path / "run", model={"compute": "fp32"})
    tokenizer = load_tokenizer(str(base))
    rows = load_dataset_for(cfg.data, tokenizer, split="eval")
    model = build_policy(cfg.model, cfg.lora, 0, None).eval()
    collate = LabelCollator(0)
    found = [token_loss(model, rows, collate, ALONE, size) for size in (1, 3, 8)]
    assert found[0]["tokens"] == rows.stats["supervised_tokens"]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    batch = collate([rows[0], rows[1]])
    masks = [row["loss_mask"] for row in (rows[0], rows[1])]
    for labels, ids, mask in zip(batch["labels"], batch["input_ids"], masks, strict=True):
        assert (labels != -100).tolist()[: len(mask)] == [bool(m) for m in mask]
        assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_the_trainer_descends_the_same_loss(base, data, tmp_path):
    """TRL's loss of a step is ours, on the rows that it saw: one batch of all rows, at learning
    rate 0.
    """
    output = go(
        "sft",
        base,
        data,
        tmp_path / "run",
        model={"compute": "fp32"},
        train={"max_steps": 1, "batch_size": 40, "warmup_ratio": 0.99},
    )
    cfg = config("sft", base, data, tmp_path / "run", model={"compute": "fp32"})
    rows = load_dataset_for(cfg.data, load_tokenizer(str(base)), split="train")
    model = build_policy(cfg.model, cfg.lora, 0, None).eval()
    expected = token_loss(model, rows, LabelCollator(0), ALONE, 8)["loss"]
    assert losses_of(output) == pytest.approx([expected], rel=1e-4)


def test_resume_equals_the_uninterrupted_run(whole, base, data, tmp_path):
    again = {
        **SIX,
        "train": {**SIX["train"], "resume": str(whole / "checkpoints" / "checkpoint-4")},
    }
    output = go("sft", base, data, tmp_path / "again", **again)
    assert same(weights(output / "adapter"), weights(whole / "adapter"))
    assert losses_of(output) == losses_of(whole)[4:]


KILLED = """
import json, os, shutil, signal, sys
import torch
torch.set_num_threads(1)
from finetune_helpers import CONFIGS
from train.finetune.__main__ import require_libraries, run
require_libraries()
import train.finetune.sft
def killing(function, when):
    def wrapped(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
def saving(value, path):
    return "checkpoint-4" in str(path) and "optimizer" in str(path)
def pruning(path, *a):
    return os.path.isdir(path) and "checkpoint-2" in str(path)
codes = {}
for moment, values in json.load(open(sys.argv[1])).items():
    pid = os.fork()
    if pid == 0:
        torch.save = killing(torch.save, saving if moment == "saving" else lambda *a: False)
        shutil.rmtree = killing(shutil.rmtree, pruning if moment == "pruning" else lambda *a: False)
        os._exit(run("sft", CONFIGS["sft"].model_validate(values), quiet=True))
    codes[moment] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def killed(base, data, tmp_path_factory):
    """moment -> the config of a run that was killed then: writing step 4, or removing step 2 after
    it.
    """
    folder, configs = tmp_path_factory.mktemp("killed"), {}
    for moment in ("saving", "pruning"):
        sections = {**SIX, "train": {**SIX["train"], "save_total_limit": 1}}
        configs[moment] = config("sft", base, data, folder / moment, **sections)
    listed, script = folder / "configs.json", folder / "killed.py"
    listed.write_text(json.dumps({m: c.model_dump(mode="json") for m, c in configs.items()}))
    script.write_text(KILLED)
    env = {**ENV, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(
        [sys.executable, str(script), str(listed)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == dict.fromkeys(configs, -signal.SIGKILL), done.stderr[-2000:]
    return configs


@pytest.mark.parametrize("moment, left", [("saving", "checkpoint-2"), ("pruning", "checkpoint-4")])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(whole, killed, moment, left):
    """It loads, and the run goes on from it to the end that it would have had."""
    cfg = killed[moment]
    output = Path(cfg.train.output)
    found = disk.checkpoints(output)
    assert [p.name for p in found] == [left]
    assert same(weights(found[0]), weights(whole / "checkpoints" / left))
    resumed = cfg.model_copy(update={"train": cfg.train.model_copy(update={"resume": "auto"})})
    assert run("sft", resumed, quiet=True) == 0
    assert same(weights(output / "adapter"), weights(whole / "adapter"))
    assert [r["step"] for r in rows_of(output)] == [1, 2, 3, 4, 5, 6]
    assert not list((output / "checkpoints").glob(".*"))


def test_a_full_disk_is_named_and_spares_the_checkpoint_before(base, data, tmp_path, monkeypatch):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        EagleError, match="No space left on device; the checkpoint before it is whole"
    ):
        go("sft", base, data, tmp_path / "run", **SIX)
    assert [p.name for p in disk.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_early_stopping_keeps_the_best(base, data, tmp_path):
    output = go(
        "sft",
        base,
        data,
        tmp_path / "run",
        lora={"r": 16},
        train={
            "max_steps": 30,
            "lr": 1.0,
            "grad_clip": 0,
            "eval_every": 1,
            "early_stopping_patience": 2,
            "save_total_limit": 1,
        },
    )
    evaluations = rows_of(output, evaluations=True)[1:]
    losses = [row["eval_loss"] for row in evaluations]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30
    step = evaluations[best]["step"]
    assert summary_of(output)["best"]["checkpoint"] == f"checkpoint-{step}"
    assert read_record(output / "adapter")["training"]["step"] == step
    kept = {p.name for p in disk.checkpoints(output)}
    assert kept == {f"checkpoint-{step}", f"checkpoint-{evaluations[-1]['step']}"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(base, data, tmp_path, monkeypatch, number):
    from train.finetune.journal import Journal

    step_end = Journal.on_step_end

    def and_then(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), number)
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Journal, "on_step_end", and_then)
    cfg = config("sft", base, data, tmp_path / "run", train={"max_steps": 9})
    assert run("sft", cfg, quiet=True) == 128 + number
    assert [p.name for p in disk.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(base, data, tmp_path, monkeypatch):
    from trl import SFTTrainer

    loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(EagleError, match="nan at step 1 on rank 0; lower train.lr"):
        go("sft", base, data, tmp_path / "run")


def test_an_adapter_goes_on_from_another(whole, base, other_base, data, tmp_path):
    output = go(
        "sft",
        base,
        data,
        tmp_path / "more",
        model={"adapter": str(whole)},
        train={"max_steps": 1, "lr": 1e-9},
    )
    before, after = weights(whole / "adapter"), weights(output / "adapter")
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    started = read_record(output / "adapter")["started_from"]
    assert started == read_record(whole / "adapter")["fingerprint"]
    with pytest.raises(EagleError, match="was trained on .* not on"):
        go("sft", other_base, data, tmp_path / "wrong", model={"adapter": str(whole)})
    assert not (tmp_path / "wrong").exists()


def test_folders_are_never_mixed_up(whole, base, data, tmp_path):
    with pytest.raises(EagleError, match="--resume, or choose another --output"):
        go("sft", base, data, whole, **SIX)
    for change in ({"train": {"seed": 5}}, {"lora": {"r": 8}}, {"model": {"quantization": "none"}}):
        sections = {k: {**SIX.get(k, {}), **change.get(k, {})} for k in ("train", "lora", "model")}
        sections["train"]["resume"] = "auto"
        with pytest.raises(EagleError, match="belongs to a run with"):
            go("sft", base, data, whole, **sections)
    with pytest.raises(EagleError, match="no checkpoint there"):
        go("sft", base, data, tmp_path / "x", train={"resume": str(tmp_path)})


def test_too_little_to_learn_from_is_refused(base, data, tmp_path):
    with pytest.raises(EagleError, match="supervises .* tokens, fewer than"):
        go("sft", base, data, tmp_path / "run", data={"min_supervised_tokens": 10**6})
    with pytest.raises(EagleError, match="exceeds the 256 positions"):
        go("sft", base, data, tmp_path / "run", data={"max_length": 500})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_real_text_is_learned(tmp_path):
    """The embedded model in NF4 learns to write cards of functions."""
    files = []
    for split, limit in (("train", 64), ("eval", 12)):
        records = card_records(*read_shipped(split), random.Random(0))
        short = [r for r in records if len(json.dumps(r)) < 420]
        files.append(write_lines(tmp_path / f"{split}.jsonl", short[:limit]))
    output = go(
        "sft",
        None,
        files[0],
        tmp_path / "run",
        lora={"r": 8},
        data={"format": "chat", "eval_path": str(files[1]), "max_length": 200},
        train={
            "max_steps": 6,
            "batch_size": 8,
            "lr": 4e-3,
            "grad_clip": 1.0,
            "log_every": 7,
            "gradient_checkpointing": False,
        },
    )
    summary = summary_of(output)
    assert summary["heldout_after"]["loss"] < summary["heldout_before"]["loss"] - 1
    assert summary["trainable_parameters"] / summary["total_parameters"] < 0.05
    assert summary["adapter_bytes"] < 3 * 2**20


@pytest.mark.parametrize(
    "fast, dtypes",
    [(True, ("bfloat16", "bf16")), (False, ("float32", "fp32"))],
    ids=["fast", "slow"],
)
def test_a_run_has_the_dtype_of_its_first_machine_and_says_so(
    data, tmp_path, monkeypatch, fast, dtypes
):
    """Of the embedded model, whose weights are bf16: what is not quantized, NF4's arithmetic and
    the computation.
    """

    def native(yes):
        for place in ("eagle.loading", "train.finetune.policy"):
            monkeypatch.setattr(f"{place}.fast_bf16", lambda device: yes)

    def recorded(folder):
        record = read_record(folder / "adapter")
        return record["dtype"], record["compute"]

    native(fast)
    train = {"max_steps": 1, "save_every": 1}
    output = go("sft", None, data, tmp_path / "run", train=train)
    model = build_policy(PolicyConfig(), LoraSection(), 0, None)
    layer = next(m for m in model.modules() if hasattr(m, "compute_dtype"))
    assert (
        layer.compute_dtype
        == model.get_input_embeddings().weight.dtype
        == getattr(torch, dtypes[0])
    )
    native(not fast)
    more = {**train, "max_steps": 2, "resume": str(output / "checkpoints" / "checkpoint-1")}
    on = go("sft", None, data, tmp_path / "on", train=more)
    assert recorded(output) == recorded(on) == dtypes
    other = "fp32" if fast else "bf16"
    with pytest.raises(EagleError, match=f"compute='{dtypes[1]}', this one has '{other}'"):
        go("sft", None, data, tmp_path / "no", train=more, model={"compute": other})


def test_a_time_budget_ends_the_run_with_a_finished_schedule(base, data, tmp_path, monkeypatch):
    """Half a minute of a clock that goes on by a second whenever it is read."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("train.finetune.journal.time", clock)
    output = go(
        "sft",
        base,
        data,
        tmp_path / "run",
        train={"max_steps": 10_000, "time_budget_minutes": 0.5, "schedule": "linear"},
    )
    rows = rows_of(output)
    assert 2 < len(rows) < 32 and rows[-1]["learning_rate"] < 0.3 * rows[0]["learning_rate"]
    assert summary_of(output)["heldout_after"] and (output / "adapter").is_dir()
