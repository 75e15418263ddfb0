"""Ranks of a run: none waits in a collective for what another does alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from head_helpers import config, losses_of, write_fim

from train.main import run

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
HURRIED = """
import os, signal, sys, time
from datetime import timedelta
import torch, deepspeed
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train.head.distributed import World
from train.main import run
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
"""
RUN = "assert run(HeadTrainConfig.model_validate_json(open(sys.argv[1]).read()), quiet=True) == 0"
FIRST = """
world = World(torch.distributed.get_rank(), 2, torch.device("cpu"))
def work():
    if sys.argv[1] == "slow":
        time.sleep(8)
    elif sys.argv[1] == "failing":
        raise EagleError("the disk is full")
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"
world.wait()
print(world.first_does(work))
assert world.max([float(world.rank)]) == [1.0]
"""


def two_ranks(tmp_path, code, argument, timeout):
    """Without a launcher, which would end a rank whose neighbour has failed: (exit codes, stdout,
    stderr) of each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "ranks.py").write_text(HURRIED + code)
    env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "ranks.py"), argument],
            cwd=ROOT,
            text=True,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=timeout) for process in started]
    return [p.returncode for p in started], *zip(*outputs, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, told",
    [("slow", None), ("failing", "rank 0 failed: the disk is full"), ("killed", "rank 0 is gone")],
)
def test_ranks_wait_for_the_first_however_long_it_takes_and_end_with_it(tmp_path, what, told):
    codes, out, err = two_ranks(tmp_path, FIRST, what, timeout=60)
    if told is None:
        assert codes == [0, 0] and out == ("done\n", "done\n"), err
    else:
        assert codes[0] and codes[1] and told in err[1]


@pytest.mark.slow
def test_two_ranks_tokenise_evaluate_and_save_for_longer_than_a_collective_may_take(base, tmp_path):
    write_fim(tmp_path / "fim.jsonl", rows=30_000)
    many = {"num_prompts": 16, "max_new_tokens": 96}
    more = {"max_steps": 2, "lr": 1e-4, "eval": many, "data_more": {"num_proc": 1}}
    two = config(base, tmp_path / "fim.jsonl", tmp_path / "two", batch_size=2, **more)
    (tmp_path / "two.json").write_text(two.model_dump_json())
    codes, _, err = two_ranks(tmp_path, RUN, str(tmp_path / "two.json"), timeout=280)
    assert codes == [0, 0], err[0][-2000:] + err[1][-2000:]
    assert (
        run(
            config(base, tmp_path / "fim.jsonl", tmp_path / "one", batch_size=4, **more), quiet=True
        )
        == 0
    )
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("two", "one")]
    first, second = (s["evaluations"][0] for s in summaries)
    for e in (first, second):
        assert e.pop("seconds") > 0
    assert first == second and first["prompts"] == 16
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
