"""Options of a step that change what it costs and not what it learns."""

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from head_helpers import config, losses_of, rows_of, trained
from safetensors.torch import load_file

from eagle.errors import EagleError
from train import runs
from train.head.accumulate import Accumulator
from train.main import run


def require_alike(a, b, rel=1e-4):
    """The same losses, gradient norms and weights, but for the order of sums."""
    assert losses_of(a) == pytest.approx(losses_of(b), rel=rel)
    norms = [[row["grad_norm"] for row in rows_of(x)] for x in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * rel)
    one, two = (load_file(x / "head/model.safetensors") for x in (a, b))
    # AdamW's first steps have the size of the learning rate wherever a gradient is nearly zero
    assert max((one[k].float() - two[k].float()).abs().mean().item() for k in one) < 1e-5


@pytest.mark.parametrize("zero", [0, 3])
def test_checkpointed_activations_change_nothing_but_memory(base, data, tmp_path, zero):
    kept = {}
    for name, on in (("plain", False), ("checkpointed", True)):
        sizes, more = [], {"checkpoint_activations": on, "zero": zero, "max_steps": 2}

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trained(base, data, tmp_path / name, **more)
        kept[name] = sum(sizes)
    assert kept["checkpointed"] < 0.7 * kept["plain"]
    require_alike(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-5)


def test_a_compiled_layer_trains_the_same(base, data, tmp_path, monkeypatch):
    """Graphs and their gradients; to make C++ of them is torch's, and slow."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    more = {"lr": 1e-4, "ttt_steps": 2, "max_steps": 1}
    eager = trained(base, data, tmp_path / "eager", **more)
    counters.clear()
    compiled = trained(base, data, tmp_path / "compiled", compile=True, **more)
    assert counters["stats"]["unique_graphs"] >= 2
    require_alike(eager, compiled)


def test_a_layer_that_does_not_compile_ends_the_run(base, data, tmp_path):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # not by monkeypatch, which leaves a setting deleted behind
    without = inductor.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True})
    said = "train.compile=true: .*install a C.. compiler"
    with without, pytest.raises(EagleError, match=said):
        run(config(base, data, tmp_path / "run", compile=True), quiet=True)


def test_a_device_without_memory_ends_the_run_with_the_remedy(base, data, tmp_path, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Accumulator, "forward", full)
    with pytest.raises(EagleError, match=r"out of memory \(no room\); .*max_tokens_per_batch"):
        run(config(base, data, tmp_path / "run"), quiet=True)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_freed_tensors_leave_goes_back_to_the_system(base, data, tmp_path, monkeypatch):
    asked, trim = [], runs.trim_heap
    monkeypatch.setattr(runs, "trim_heap", lambda *given: asked.append(given))
    trained(base, data, tmp_path / "run", max_steps=2)
    assert asked == [(step, torch.device("cpu")) for step in (1, 2)]
    tensors = [torch.ones(20_000) for _ in range(2000)]  # 80 kB each, from the heap
    held, last = resident(), tensors.pop()  # above the others: glibc alone gives nothing back
    del tensors[:]
    trim(runs.TRIM_EVERY - 1, last.device)
    assert held - resident() < 40
    trim(runs.TRIM_EVERY, last.device)
    assert held - resident() > 120
