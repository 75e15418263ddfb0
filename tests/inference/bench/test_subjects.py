"""The bench's smaller subjects: slots, sandbox, training; and the command that names them."""

import json
import math
from importlib import import_module

import pytest

from inference.bench.__main__ import SUBJECTS
from inference.bench.sandbox import sandbox
from inference.bench.slots import measure_slots
from inference.bench.train import train


def last(out):
    return json.loads(out.splitlines()[-1])


def test_every_subject_is_a_command():
    for module, name in SUBJECTS.items():
        assert callable(getattr(import_module(f"inference.bench.{module}"), name))


def test_slots(in_process, model_folder, head_folder, tmp_path):
    flags = "--num_prompts 5 --slots 2 --max_new_tokens 8 --compile off --repeats 1 --device cpu"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "def f{i}():"}}\n' for i in range(5)))
    base = ["--base", model_folder, "--head", head_folder, "--prompts", prompts]
    code, out, err = in_process(measure_slots, *base, *flags.split())
    assert code == 0, err
    queue, batches = last(out)["runs"]
    assert queue["new_tokens"] == batches["new_tokens"] > 0
    ratio = queue["tokens_per_second"] / batches["tokens_per_second"]
    assert last(out)["slots_vs_batches"] == pytest.approx(ratio, rel=0.01)


def test_sandbox(in_process):
    flags = "--tests 4 --repeats 1 --workers 2"
    code, out, _ = in_process(sandbox, *flags.split())
    runs = last(out)["runs"]
    assert code == 0 and [run["program"] for run in runs] == ["stdin", "call"]
    assert all(run["isolation"]["level"] == run["level"] for run in runs)
    assert all(run["tests_per_second"] > 0 for run in runs)


@pytest.mark.slow
def test_training_arms_do_the_same_work(in_process, model_folder, tmp_path, own_cache):
    row = {"prefix": "def add(a, b):\n", "middle": "    return a + b\n", "suffix": "\n\nx = 1\n"}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"suffix": f"x = {i}\n"}) + "\n" for i in range(20)))
    flags = (
        "train.batch_size=2 train.ttt_steps=2 data.max_length=64 train.dtype=fp32"
        " data.min_supervised_tokens=1 --arms fused,naive,recompute --steps 1 --repeats 2"
        " --loss_vocab 4096 --loss_tokens 512 --loss_hidden 16"
    )
    files = ["--base", model_folder, "--data", data]
    code, out, err = in_process(train, *files, *flags.split())
    assert code == 0, err
    fused, naive, *arms = last(out)["runs"]
    assert fused["peak_bytes"] < 0.8 * naive["peak_bytes"]
    assert fused["peak_bytes"] > 2 * 4096 * 16 * 4  # the gradient of the weight
    assert [arm["which"] for arm in arms] == ["fused", "naive", "recompute"]
    for arm in arms:
        assert len(arm["rates"]) == 2 and arm["ratio"] > 0
        assert set(arm["seconds"]) >= {"data", "target", "head", "backward"}
        # the same rows and updates, whatever the arm
        for one, other in zip(arm["loss"], arms[0]["loss"], strict=True):
            assert math.isclose(one, other, rel_tol=1e-3)
