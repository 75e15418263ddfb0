"""Several processes and one piece of work: the same data, or ranks of a run. None waits in a
collective for what another does alone."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import write_jsonl
from head_helpers import config, losses_of, write_fim

from configs.schema import DataConfig
from records import cache, load_dataset_for
from train.main import run

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LOAD = """
import json, sys
from configs.schema import DataConfig
from records import load_dataset_for, load_tokenizer
folder, path, cache = sys.argv[1:]
cfg = DataConfig(format="plain", path=path, cache_dir=cache)
data = load_dataset_for(cfg, load_tokenizer(folder))
print(json.dumps([data.cache_hit, [data[i] for i in range(len(data))]]))
"""


def test_of_two_processes_one_builds_the_entry(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"word {n}"} for n in range(3000)])
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", LOAD, str(tokenizer_dir), str(path), str(cache)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    (hit, first), (other_hit, second) = (json.loads(out) for out, _ in outputs)
    assert first == second and len(first) > 2900 and {hit, other_hit} == {False, True}
    assert len(list((cache / "tokenised").iterdir())) == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / ".lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom records.cache import _alone\n"
        "with _alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=ENV, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with cache._alone(path):
        assert path.exists()
    assert time.monotonic() - began < 1 and not path.exists()


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_tokenises_the_same(tmp_path, tokenizer, processes):
    rng, lines = random.Random(0), []
    for n in range(2600):
        text = " ".join(
            rng.choice(["def", "class", "é", "x = 1"]) for _ in range(rng.randint(1, 30))
        )
        lines.append("{oops" if n % 97 == 5 else json.dumps({"text": text if n % 50 else ""}))
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = []
    for count in (1, processes):
        cfg = DataConfig(
            format="plain", path=str(path), cache_dir=str(tmp_path / str(count)), num_proc=count
        )
        data = load_dataset_for(cfg, tokenizer, out_dir=tmp_path / str(count))
        folder = data.sources[0].entry.folder
        files = [
            (folder / name).read_bytes()
            for name in ("rows.arrow", "stats.json", "quarantine.jsonl")
        ]
        found.append(
            (files, (tmp_path / str(count) / "quarantine.jsonl").read_bytes(), data.digest)
        )
    assert found[0] == found[1] and data.stats["bad"] == 79


def test_a_process_that_is_killed_ends_the_tokenising(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"word {n}"} for n in range(2000)])

    def die(record):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("records.dataset.make_renderer", lambda *_: die)
    cfg = DataConfig(format="plain", path=str(path), cache_dir=str(tmp_path / "cache"), num_proc=2)
    with pytest.raises(ValueError, match="lower data.num_proc"):
        load_dataset_for(cfg, tokenizer)
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []


# ranks

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
