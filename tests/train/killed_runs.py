"""A run killed again and again, in forked processes: the imports are paid once.

python killed_runs.py CONFIG.json KILLS SEED -> one JSON line: {"moments": […], "steps": […]}
Trains CONFIG into its output undisturbed, and into OUTPUT-killed with KILLS kills."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from configs.schema import HeadTrainConfig
from train import runs
from train.head import state as disk
from train.head.distributed import import_deepspeed
from train.main import run

import_deepspeed()
import datasets  # noqa: F401
import transformers  # noqa: F401

import eagle.model  # noqa: F401
import train.head.loop  # noqa: F401


def start(values: dict, output: Path, resume: str | None) -> int:
    """A child process that trains; returns its id."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        train = {**values["train"], "output": str(output), "resume": resume}
        code = run(HeadTrainConfig.model_validate({**values, "train": train}), quiet=True)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def require_newest_loads(output: Path) -> int:
    """Every checkpoint is whole, the newest one above all; returns its step, 0 without any."""
    steps = [disk.load_checkpoint(path).info["step"] for path in runs.checkpoints(output)]
    pointer = output / "checkpoints" / "latest"
    if pointer.exists():
        assert disk.load_checkpoint(pointer.with_name(pointer.read_text().strip()))
    return max(steps, default=0)


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    kills, rng = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    whole = Path(values["train"]["output"])
    killed = whole.with_name(whole.name + "-killed")

    pid = start(values, whole, None)
    while not runs.checkpoints(whole) and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.005)
    begun = time.monotonic()
    assert ended(pid) == 0
    training = time.monotonic() - begun

    moments, steps, resume = [], [], None
    for number in range(kills):
        pid, before = start(values, killed, resume), runs.checkpoints(killed)[-1:]
        while number % 2 and runs.checkpoints(killed)[-1:] == before:
            time.sleep(0.005)  # every second one first gets as far as a checkpoint
        # each lets at most its share of the run through, so that it is not done before the last
        moments.append(rng.uniform(0, training / kills))
        time.sleep(moments[-1])
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL, "the run ended before it could be killed"
        steps.append(require_newest_loads(killed))
        resume = "auto"
    assert ended(start(values, killed, "auto")) == 0
    print(json.dumps({"moments": moments, "steps": steps}))


if __name__ == "__main__":
    main()
