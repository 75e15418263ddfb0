"""When memory does not suffice: the same rows in smaller micro-batches, the same gradient."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_helpers import config, losses_of, rows_of
from safetensors.torch import load_file

from eagle.errors import EagleError
from records.shipped import shipped
from train.head.accumulate import Accumulator
from train.head.engine import Engine
from train.main import run

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def require_alike(a, b, rel=1e-4):
    """The same losses, gradient norms and weights, but for the order of sums."""
    assert losses_of(a) == pytest.approx(losses_of(b), rel=rel)
    norms = [[row["grad_norm"] for row in rows_of(x)] for x in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * rel)
    one, two = (load_file(x / "head/model.safetensors") for x in (a, b))
    # AdamW's first steps have the size of the learning rate wherever a gradient is nearly zero
    assert max((one[k].float() - two[k].float()).abs().mean().item() for k in one) < 1e-5


def no_room_for(rows: int, monkeypatch, method: str) -> list[int]:
    """Forward or backward fails above `rows` rows, a backward pass after it has left its
    gradients.
    """
    tried, forward, backward = [], Accumulator._forward, Engine.backward

    def small_forward(self, batch, *rest):
        tried.append(len(batch.places))
        if method == "forward" and tried[-1] > rows and self.step >= 2:
            raise torch.OutOfMemoryError("no room")
        return forward(self, batch, *rest)

    def small_backward(self, loss, last):
        backward(self, loss, last)
        if method == "backward" and tried[-1] > rows and len(tried) > 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Accumulator, "_forward", small_forward)
    monkeypatch.setattr(Engine, "backward", small_backward)
    return tried


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_micro_batches_are_halved_until_they_fit(
    base, data, tmp_path, monkeypatch, caplog, zero, method
):
    more = {"zero": zero, "grad_accum": 2, "batch_size": 5, "max_steps": 3, "lr": 1e-4}
    assert run(config(base, data, tmp_path / "free", **more), quiet=True) == 0
    tried = no_room_for(2, monkeypatch, method)
    assert run(config(base, data, tmp_path / "tight", **more), quiet=True) == 0
    assert max(tried) == 5 and tried[-6:] == [2, 2, 1] * 2
    require_alike(tmp_path / "free", tmp_path / "tight")
    [first, second] = json.loads((tmp_path / "tight/summary.json").read_text())["warnings"]
    assert "out of memory at step" in first and "cut into 4" in second


def test_the_cut_is_resumed(base, data, tmp_path, monkeypatch):
    more = {"batch_size": 4, "max_steps": 4, "save_every": 2, "save_total_limit": 9}
    no_room_for(2, monkeypatch, "forward")
    assert run(config(base, data, tmp_path / "whole", **more), quiet=True) == 0
    start = str(tmp_path / "whole/checkpoints/step-2")
    assert run(config(base, data, tmp_path / "cut", resume=start, **more), quiet=True) == 0
    one, two = (load_file(tmp_path / x / "head/model.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("zero, remedy", [(0, "checkpoint_activations"), (2, "train.zero=1")])
def test_what_cannot_be_cut_says_what_to_do(base, data, tmp_path, monkeypatch, zero, remedy):
    no_room_for(0, monkeypatch, "forward")
    with pytest.raises(EagleError, match=rf"out of memory \(no room\); .*{remedy}"):
        run(config(base, data, tmp_path / "run", zero=zero), quiet=True)


@pytest.mark.parametrize("zero", [0, 3])
def test_checkpointed_activations_change_nothing_but_memory(base, data, tmp_path, zero):
    kept = {}
    for name, on in (("plain", False), ("checkpointed", True)):
        sizes = []
        cfg = config(base, data, tmp_path / name, checkpoint_activations=on, zero=zero, max_steps=3)

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert run(cfg, quiet=True) == 0
        kept[name] = sum(sizes)
    assert kept["checkpointed"] < 0.7 * kept["plain"]
    require_alike(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-5)


RANKS = """
import sys, torch
from configs.schema import HeadTrainConfig
from train.head.accumulate import Accumulator
from train.main import run
forward = Accumulator._forward
def small(self, batch, *rest):
    if self.world.rank == 1 and len(batch.places) > 1:  # the second rank alone has little memory
        raise torch.OutOfMemoryError("no room")
    return forward(self, batch, *rest)
Accumulator._forward = small
assert run(HeadTrainConfig.model_validate_json(open(sys.argv[1]).read()), quiet=True) == 0
"""


@pytest.mark.slow
def test_one_rank_without_memory_makes_all_cut_smaller(base, data, tmp_path):
    more = {"max_steps": 2, "zero": 1, "lr": 1e-4}
    cfg = config(base, data, tmp_path / "two", batch_size=2, **more)
    (tmp_path / "two.json").write_text(cfg.model_dump_json())
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "ranks.py"),
        str(tmp_path / "two.json"),
    ]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(config(base, data, tmp_path / "one", batch_size=4, **more), quiet=True) == 0
    require_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_compiled_layer_trains_the_same(base, data, tmp_path):
    from torch._dynamo.utils import counters

    more = {"max_steps": 4, "lr": 1e-4, "ttt_steps": 2}
    assert run(config(base, data, tmp_path / "eager", **more), quiet=True) == 0
    counters.clear()
    assert run(config(base, data, tmp_path / "compiled", compile=True, **more), quiet=True) == 0
    assert counters["stats"]["unique_graphs"] >= 2
    require_alike(tmp_path / "eager", tmp_path / "compiled")


def test_a_layer_that_does_not_compile_ends_the_run(base, data, tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(EagleError, match="train.compile=true: .*install a C.. compiler"):
        run(config(base, data, tmp_path / "run", compile=True), quiet=True)


GROWN = """
import ctypes, sys
kind, folder = sys.argv[1:]
small = ["train.max_steps=10", "train.batch_size=4", "data.max_length=256", f"data.cache_dir={folder}"]
if kind == "head":
    from train.main import train
    train(*small, "train.report_to=none", "eval.num_prompts=0", data_format="chat", output=f"{folder}/run")
else:
    from train.finetune.__main__ import sft
    sft(*small, "train.grad_accum=1", f"data.eval_path={folder}/few.jsonl", data_format="chat", output=f"{folder}/run")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
ctypes.CDLL(None).malloc_trim(0)
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
@pytest.mark.parametrize("kind", ["head", "sft"])
def test_what_freed_tensors_leave_does_not_pile_up(tmp_path, kind):
    """Steps on rows of all lengths: of what the process holds hardly anything is free (160 MB of it
    were).
    """
    lines = shipped("chat", "eval").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:4]))
    command = [sys.executable, "-c", GROWN, kind, str(tmp_path)]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 100
