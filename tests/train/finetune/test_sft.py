"""Supervised runs: what they leave behind, that they resume exactly, and that nothing tears
them.
"""

import itertools
import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from finetune_helpers import (
    SIX,
    config,
    fingerprint_of,
    go,
    losses_of,
    rows_of,
    same,
    summary_of,
    write_lines,
)
from safetensors.torch import load_file

from configs.finetune_schema import LoraSection, PolicyConfig
from eagle.errors import EagleError
from eagle.loading import RECORD, WEIGHTS, read_record
from eagle.target import Target
from records import load_dataset_for, load_tokenizer
from train.finetune import trainer
from train.finetune.__main__ import run
from train.finetune.policy import build_policy
from train.finetune.run import require_whole
from train.runs import checkpoints, find_checkpoint


def names(output):
    return [path.name for path in checkpoints(output)]


def six(**train):
    return {**SIX, "train": {**SIX["train"], **train}}


def test_a_run_leaves_adapter_metrics_and_summary(whole, base):
    adapter, summary = whole / "adapter", summary_of(whole)
    files = {p.name for p in adapter.iterdir()}
    assert {WEIGHTS, "adapter_config.json", RECORD, "README.md", "tokenizer.json"} <= files
    assert not {n for n in files if n.endswith((".pt", ".bin", ".pth"))}
    assert "model.safetensors" not in files
    assert summary["adapter_bytes"] < 200_000 and summary["peak_memory_mb"] > 10
    weights = load_file(adapter / WEIGHTS).values()
    assert summary["trainable_parameters"] == sum(p.numel() for p in weights)
    assert 0 < summary["trainable_share"] < 0.5
    assert [r["step"] for r in rows_of(whole)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows_of(whole, evaluations=True)] == [0, 6]
    assert summary["heldout_after"]["loss"] < summary["heldout_before"]["loss"]
    record = read_record(adapter)
    assert record["base"] == {"id": str(base.resolve()), "fingerprint": fingerprint_of(base)}
    assert record["quantization"] == "nf4"
    assert record["data"]["rows"] + record["data"]["heldout_rows"] == 40
    assert names(whole) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(p.dtype == torch.float32 for p in weights)


def test_the_adapter_loads_where_it_belongs(whole, base):
    """In peft, on a base in 4 bit and in full precision, and in the engine's target."""
    ids, logits = torch.arange(5, 25)[None], {}
    for quantization in ("nf4", "none"):
        arithmetic = {"quantization": quantization, "dtype": "float32", "compute": "fp32"}
        policy = PolicyConfig(base=str(base), adapter=str(whole), **arithmetic)
        model = build_policy(policy, LoraSection(), 0).eval()
        with torch.no_grad():
            logits[quantization] = model(input_ids=ids).logits
            with model.disable_adapter():
                assert (model(input_ids=ids).logits - logits[quantization]).abs().max() > 1e-3
    target = Target.from_pretrained(base, dtype="float32", adapter_path=str(whole / "adapter"))
    assert target.identity["adapter"] == read_record(whole / "adapter")["fingerprint"]
    with target.stock() as stock, torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, logits["none"], atol=1e-4)


def test_losses_are_means_over_supervised_tokens_however_they_are_batched(base, data, tmp_path):
    """TRL's of a step, of one batch of all rows, and ours over the held-out rows: each against the
    stock model's, a row at a time."""
    train = {"max_steps": 1, "batch_size": 40, "eval_batch_size": 3, "warmup_ratio": 0.99}
    sections = {"model": {"compute": "fp32"}, "train": train}
    output = go("sft", base, data, tmp_path / "run", **sections)
    cfg = config("sft", base, data, tmp_path / "run", **sections)
    model = build_policy(cfg.model, cfg.lora, 0).eval()

    def expected(split):
        total = tokens = 0
        for row in load_dataset_for(cfg.data, load_tokenizer(str(base)), split=split):
            ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["loss_mask"]])
            labels = ids.masked_fill(mask == 0, -100)
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * sum(row["loss_mask"])
            tokens += sum(row["loss_mask"])
        return total / tokens, tokens

    assert losses_of(output) == pytest.approx([expected("train")[0]], rel=1e-4)
    assert rows_of(output)[0]["learning_rate"] == 1e-3  # a run of one step learns
    assert any(p.any() for k, p in load_file(output / "adapter" / WEIGHTS).items() if "_B" in k)
    first = rows_of(output, evaluations=True)[0]
    found = first["eval_loss"], first["eval_tokens"]
    assert found == pytest.approx(expected("eval"), rel=1e-5)


@pytest.mark.parametrize("moment, left", [("saving", "checkpoint-2"), ("pruning", "checkpoint-4")])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(whole, base, data, tmp_path, moment, left):
    """Writing step 4, or removing step 2 after it: what is left loads, and the run goes on from it
    to the end that it would have had."""
    output = tmp_path / "run"
    cfg = config("sft", base, data, output, **six(save_total_limit=1))

    def killing(function, when):
        def wrapped(*args, **kwargs):
            if when(*map(str, args)):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    if (pid := os.fork()) == 0:
        try:
            if moment == "saving":
                torch.save = killing(torch.save, lambda v, path: "checkpoint-4/optimizer" in path)
            else:
                shutil.rmtree = killing(
                    shutil.rmtree, lambda path, *a: "checkpoint-2" in path and os.path.isdir(path)
                )
            run("sft", cfg, quiet=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    [found] = checkpoints(output)
    assert found.name == left and same(found, whole / "checkpoints" / left)
    go("sft", base, data, output, **six(save_total_limit=1, resume="auto"))
    assert same(output / "adapter", whole / "adapter") and losses_of(output) == losses_of(whole)
    assert [r["step"] for r in rows_of(output)] == [1, 2, 3, 4, 5, 6]
    assert not list((output / "checkpoints").glob(".*"))


def test_a_full_disk_is_named_and_spares_the_checkpoint_before(base, data, tmp_path, monkeypatch):
    """The quota of this process, from step 4 on: the adapter fits, the optimizer does not."""
    write, (soft, hard) = trainer.write_adapter, resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(folder, *args):
        write(folder, *args)
        if "checkpoint-4" in str(folder):
            most = (folder / WEIGHTS).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))

    monkeypatch.setattr(trainer, "write_adapter", then_full)
    try:
        with pytest.raises(EagleError, match="No space left on device; the checkpoints of .*whole"):
            go("sft", base, data, tmp_path / "run", **SIX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "file, keep, flip",
    [("optimizer.pt", 0.5, 0), ("optimizer.pt", 1, 1), (WEIGHTS, 0.5, 0), ("scheduler.pt", 0, 0)],
)
def test_a_damaged_checkpoint_is_set_aside_and_told(whole, tmp_path, caplog, file, keep, flip):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/checkpoint-6" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= flip
    path.write_bytes(content[: int(len(content) * keep)]) if keep else path.unlink()
    found, _ = find_checkpoint(tmp_path, "auto", require_whole)
    assert found.name == "checkpoint-4" and (tmp_path / "checkpoints/damaged-checkpoint-6").is_dir()
    assert f"checkpoint-6 cannot be read ({file}" in caplog.text


def test_a_resumed_run_learns_by_its_own_settings(whole, base, data, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    cfg = config("sft", base, data, tmp_path / "run", **six(max_steps=7, lr=0.5, resume="auto"))
    for _ in range(2):
        assert run("sft", cfg) == 0
        assert rows_of(tmp_path / "run")[-1]["learning_rate"] == 0.5
    said = capsys.readouterr().out
    assert "checkpoint-6\nsettings changed: train.max_steps 6 -> 7, train.lr 0.01 -> 0.5\n" in said
    assert said.count("checkpoint-7 has its 7 steps: nothing is left to train") == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_early_stopping_keeps_the_best(base, data, tmp_path):
    """Of answers that are never seen, the loss falls for a while at most."""
    train = {"max_steps": 30, "lr": 0.1, "grad_clip": 0, "eval_every": 1, "save_total_limit": 1}
    train["early_stopping_patience"] = 1
    never = [{"instruction": f"say {n}", "output": "9 8 7 6 5"} for n in range(4)]
    rows = {"eval_path": str(write_lines(tmp_path / "never.jsonl", never))}
    output = go("sft", base, data, tmp_path / "run", lora={"r": 16}, train=train, data=rows)
    evaluations = rows_of(output, evaluations=True)[1:]
    losses = [row["eval_loss"] for row in evaluations]
    best = losses.index(min(losses))
    assert len(losses) == best + 2 < 30
    step = evaluations[best]["step"]
    assert summary_of(output)["best"]["checkpoint"] == f"checkpoint-{step}"
    assert read_record(output / "adapter")["training"]["step"] == step
    assert names(output) == [f"checkpoint-{step}", f"checkpoint-{evaluations[-1]['step']}"]


def test_a_signal_saves_and_stops(base, data, tmp_path, monkeypatch):
    from train.finetune.trainer import Journal

    step_end = Journal.on_step_end

    def and_then(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Journal, "on_step_end", and_then)
    cfg = config("sft", base, data, tmp_path / "run", train={"max_steps": 9})
    assert run("sft", cfg, quiet=True) == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(base, data, tmp_path, monkeypatch):
    from trl import SFTTrainer

    loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(EagleError, match="nan at step 1; lower train.lr"):
        go("sft", base, data, tmp_path / "run")


def test_an_adapter_goes_on_from_another(whole, base, other_base, data, tmp_path):
    more = {"model": {"adapter": str(whole)}, "train": {"max_steps": 1, "lr": 1e-9}}
    output = go("sft", base, data, tmp_path / "more", **more)
    before, after = (load_file(run / "adapter" / WEIGHTS) for run in (whole, output))
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    started = read_record(output / "adapter")["started_from"]
    assert started == read_record(whole / "adapter")["fingerprint"]
    with pytest.raises(EagleError, match="was trained on .* not on"):
        go("sft", other_base, data, tmp_path / "wrong", model={"adapter": str(whole)})
    assert not (tmp_path / "wrong").exists()


def test_folders_are_never_mixed_up(whole, base, data, tmp_path):
    with pytest.raises(EagleError, match="--resume, or choose another --output"):
        go("sft", base, data, whole, **SIX)
    turned = tmp_path / "turned.jsonl"  # the same rows
    turned.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    changes = [{"train": {name: n}} for name, n in (("seed", 5), ("grad_accum", 3), ("zero", 1))]
    changes += [{"lora": {"r": 8}}, {"model": {"quantization": "none"}}]
    for change in [*changes, {"data": {"path": str(turned)}}, {"data": {"seed": 5}}]:
        sections = six(resume="auto")
        sections |= {k: {**sections.get(k, {}), **v} for k, v in change.items()}
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


def test_a_run_has_the_dtype_of_its_first_machine_and_says_so(data, tmp_path, monkeypatch):
    """Of the embedded model, whose weights are bf16: what is not quantized, NF4's arithmetic and
    the computation; on a machine that emulates bf16, and then on one that does not.
    """

    def native(yes):
        monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: yes)

    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        native(fast)
        model = build_policy(PolicyConfig(), LoraSection(), 0)
        layer = next(m for m in model.modules() if hasattr(m, "compute_dtype"))
        assert layer.compute_dtype == model.get_input_embeddings().weight.dtype == dtype
    train = {"max_steps": 1, "save_every": 1}
    output = go("sft", None, data, tmp_path / "run", train=train)
    native(True)
    more = {**train, "max_steps": 2, "resume": str(output / "checkpoints" / "checkpoint-1")}
    on = go("sft", None, data, tmp_path / "on", train=more)
    for record in (read_record(folder / "adapter") for folder in (output, on)):
        assert (record["dtype"], record["compute"]) == ("float32", "fp32")
    with pytest.raises(EagleError, match="compute='fp32', this one has 'bf16'"):
        go("sft", None, data, tmp_path / "no", train=more, model={"compute": "bf16"})


def test_a_time_budget_ends_the_run_with_a_finished_schedule(base, data, tmp_path, monkeypatch):
    """Half a minute of a clock that goes on by a second whenever it is read."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__, perf_counter=lambda: 0.0)
    monkeypatch.setattr("train.finetune.trainer.time", clock)
    train = {"max_steps": 10_000, "time_budget_minutes": 0.5, "schedule": "linear"}
    output = go("sft", base, data, tmp_path / "run", train=train)
    rows = rows_of(output)
    assert 2 < len(rows) < 32 and rows[-1]["learning_rate"] < 0.3 * rows[0]["learning_rate"]
    assert summary_of(output)["heldout_after"] and (output / "adapter").is_dir()
