"""Heads on disk: the published layout, bit for bit, whole or not at all."""

import json
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from engine_helpers import make_head, make_target
from safetensors.torch import load_file, save_file

from eagle import files
from eagle.checkpoint import load_head, save_head, target_fingerprint
from eagle.errors import EagleError

D, V = 48, 128


@pytest.fixture
def saved(tmp_path, llama):
    head = make_head(llama, D).to(torch.bfloat16)
    return head, save_head(head, tmp_path / "head", {"target": llama.identity})


MALFORMED = yaml.safe_load(Path(__file__).with_name("malformed.yaml").read_text("utf-8"))
CHANGES = [{field: value} for field, values in MALFORMED["fields"].items() for value in values]
CHANGES += [*MALFORMED["together"], {"config.json": "[" * 100_000}]


def shown(change):
    return ",".join(f"{k}={str(v)[:20]}" for k, v in change.items())


@pytest.mark.parametrize("with_target", [False, True], ids=["alone", "with-target"])
@pytest.mark.parametrize("change", CHANGES, ids=shown)
def test_a_malformed_config_is_one_error_at_once(saved, llama, change, with_target):
    """Whatever stands in the files, nothing is allocated for it and no other error comes of it."""
    folder, file = saved[1], "config.json"
    if next(iter(change)).endswith(".json"):
        ((file, value),) = change.items()
    else:
        value = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))
    started = time.perf_counter()
    with pytest.raises(EagleError) as error:
        load_head(folder, llama if with_target else None)
    assert time.perf_counter() - started < 1 and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["d2t"].__setitem__(-1, V),
        lambda s: s["d2t"].__setitem__(0, -1),
        lambda s: s["d2t"].__setitem__(0, 2**62),
        lambda s: s.update(d2t=s["d2t"].float()),
        lambda s: s.update(t2d=s["t2d"].float()),
        lambda s: s.update(d2t=s["d2t"] * 0),
        lambda s: s.update({"fc.weight": s["fc.weight"].to(torch.int8)}),
        lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.float8_e4m3fn)}),
    ],
    ids="beyond before far-beyond float-d2t float-t2d t2d-of-another int8 float8".split(),
)
def test_tensors_that_no_head_has(saved, llama, change):
    state = load_file(saved[1] / "model.safetensors")
    change(state)
    save_file(state, saved[1] / "model.safetensors")
    for known in (None, llama):
        with pytest.raises(EagleError, match="d2t does not give|of a dtype that no|contradict"):
            load_head(saved[1], known)


def test_damaged_or_absent_files_are_named(saved, tmp_path):
    with pytest.raises(EagleError, match="no head folder"):
        load_head(tmp_path / "nowhere")
    state = load_file(saved[1] / "model.safetensors")
    save_file(
        {**state, "fc.weight": state["fc.weight"] * torch.nan}, saved[1] / "model.safetensors"
    )
    with pytest.raises(EagleError, match="fc.weight holds NaN"):
        load_head(saved[1])
    (saved[1] / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(EagleError, match="damaged"):
        load_head(saved[1])


def test_a_head_of_another_target_is_refused_or_warned_about(saved, llama):
    for other in ({"hidden_size": 40}, {"vocab_size": 129}):
        with pytest.raises(EagleError, match="does not belong"):
            load_head(saved[1], make_target("llama", **other))
    with pytest.warns(UserWarning, match="was trained on tiny-llama"):
        load_head(saved[1], make_target("llama", seed=5))
    half = make_target("llama")
    half.model.to(torch.bfloat16)
    assert target_fingerprint(half.model) == llama.identity["fingerprint"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_head(saved[1], half)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "text"
    files.atomic_write_text(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"


WRITER = """
import sys, torch
import eagle.checkpoint as c
head, _ = c.load_head(sys.argv[1])
while True:
    with torch.no_grad():
        head.fc.weight.fill_(float(head.fc.weight[0, 0]) % 100 // 1 + 1)
    c.save_head(head, sys.argv[1])
    print("saved", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_head(tmp_path, llama):
    folder = save_head(make_head(llama), tmp_path / "head")
    command = [sys.executable, "-c", WRITER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = listing(tmp_path)
    head, _ = load_head(folder, llama)
    assert (head.fc.weight == head.fc.weight[0, 0]).all()
    assert listing(tmp_path) == left  # who reads changes nothing; the next writer tidies up
    save_head(head, folder)
    assert listing(tmp_path) == ["head"]


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_kill_between_two_renames_is_read_in_place_and_repaired_by_the_writer(saved):
    """Of file systems that cannot exchange two names."""
    head, folder = saved
    old = f".head.old-{files._machine()}-999999999"
    folder.rename(folder.with_name(old))
    again, _ = load_head(folder)
    assert torch.equal(again.fc.weight, head.fc.weight) and listing(folder.parent) == [old]
    with pytest.raises(RuntimeError), files.atomic_dir(folder):
        raise RuntimeError("a writer that fails")
    assert listing(folder.parent) == ["head"]
    load_head(folder)


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "renames"])
def test_another_machines_live_write_is_left_alone(saved, monkeypatch, swap):
    """A process id says nothing on a disk that is shared: 999999999 lives there, and 1 is not this
    machine's."""
    if not swap:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    head, folder = saved
    theirs = [
        f".head.{kind}-0123456789ab-{pid}" for kind in ("old", "tmp") for pid in (1, 999999999)
    ]
    theirs += [".head.tmp-999999999"]  # as earlier versions named it: nobody knows whose it is
    for name in theirs:
        (folder.parent / name).mkdir()
    for _ in range(2):
        load_head(folder)
        save_head(head, folder)
    assert listing(folder.parent) == sorted([*theirs, "head"])


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path):
    pair = [tmp_path / "a", tmp_path / "b"]
    for path in pair:
        path.mkdir()
    if not files.exchange(*pair):
        pytest.skip("this file system cannot exchange two names")
    stop = threading.Event()

    def write():
        while not stop.is_set():
            with files.atomic_dir(pair[0]) as folder:
                (folder / "file").touch()

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(write)
        found = [pair[0].is_dir() for _ in range(20_000)]
        stop.set()
    assert all(found) and writer.result() is None and listing(tmp_path) == ["a", "b"]
