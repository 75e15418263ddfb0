"""Several ranks learn what one does, and none gives up on another that works alone."""

import json
import os
import socket
import subprocess
import sys

import pytest
from engine_helpers import assert_quiet
from head_helpers import ROOT, config, drafts_of, losses_of, rows_of, run_python, trained
from safetensors.torch import load_file

ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUNS = """
import sys
import train.tracking.report
from configs.schema import HeadTrainConfig
from train.main import run
train.tracking.report.draw = lambda run: {}  # takes longer than a run
for path in sys.argv[1:]:
    assert run(HeadTrainConfig.model_validate_json(open(path).read()), quiet=True) == 0
"""
HURRIED = """
import os, signal, sys, time
from datetime import timedelta
import torch
from eagle.errors import EagleError
from train.head.distributed import World
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
world = World(torch.distributed.get_rank(), 2, torch.device("cpu"))
def slow():
    time.sleep(8)
    return "done"
def failing():
    raise EagleError("the disk is full")
world.wait()
print(world.first_does(slow), flush=True)
assert world.max([float(world.rank)]) == [1.0]
try:
    world.first_does(failing)
except EagleError as error:
    print(error, flush=True)
world.first_does(lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_ranks_wait_for_the_first_however_long_it_takes_and_end_with_it(tmp_path):
    """Without a launcher, which would end a rank whose neighbour has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "ranks.py").write_text(HURRIED)
    env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, str(tmp_path / "ranks.py")]
    started = [
        subprocess.Popen(command, env={**env, "RANK": str(n), "LOCAL_RANK": str(n)}, **pipes)
        for n in range(2)
    ]
    out, err = zip(*(process.communicate(timeout=60) for process in started), strict=True)
    assert out == ("done\nthe disk is full\n", "done\nrank 0 failed: the disk is full\n"), err
    assert all(process.returncode for process in started) and "rank 0 is gone" in err[1]


@pytest.mark.slow
def test_two_ranks_equal_one(base, data, tmp_path):
    """Each ZeRO stage, evaluations shared out, and a checkpoint of two ranks that goes on with
    one."""
    more = {"max_steps": 3, "save_every": 2, "save_total_limit": 9, "lr": 1e-4}
    more["eval"] = {"num_prompts": 3}
    files = []
    for zero in range(4):
        cfg = config(base, data, tmp_path / f"two{zero}", zero=zero, batch_size=2, **more)
        files.append(tmp_path / f"two{zero}.json")
        files[-1].write_text(cfg.model_dump_json())
    script = tmp_path / "ranks.py"
    script.write_text(RUNS)
    launcher = "torch.distributed.run --standalone --nproc_per_node 2".split()
    assert_quiet(run_python("-m", *launcher, script, *files))
    one = trained(base, data, tmp_path / "one", batch_size=4, **more)
    losses, taus, weights = losses_of(one), taus_of(one), load_file(one / "head/model.safetensors")
    drafts = drafts_of(one / "head", base)
    for zero in range(4):
        two = tmp_path / f"two{zero}"
        assert losses_of(two) == pytest.approx(losses, rel=1e-4) and taus_of(two) == taus
        found = load_file(two / "head/model.safetensors")
        # AdamW's first steps have the size of the learning rate wherever a gradient is nearly zero
        apart = [(weights[k].float() - found[k].float()).abs().mean().item() for k in weights]
        assert max(apart) < 1e-5 and drafts_of(two / "head", base) == drafts
    for zero in (0, 3):
        more["resume"] = str(tmp_path / f"two{zero}/checkpoints/step-2")
        output = trained(base, data, tmp_path / f"more{zero}", batch_size=4, **more)
        assert [row["step"] for row in rows_of(output)] == [3]
        assert losses_of(output) == pytest.approx(losses[2:], rel=1e-4)


def taus_of(output):
    summary = json.loads((output / "summary.json").read_text())
    return [(e["step"], e["prompts"], e["tau"]) for e in summary["evaluations"]]
