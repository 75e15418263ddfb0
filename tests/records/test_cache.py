"""The cache of tokenised rows: what it depends on, and several processes at one entry."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for

ROOT = Path(__file__).parents[2]
LOAD = """
import json, sys
from configs.schema import DataConfig
from records import load_dataset_for, load_tokenizer
folder, path, cache, processes = sys.argv[1:]
cfg = DataConfig(format="plain", path=path, cache_dir=cache, num_proc=int(processes))
data = load_dataset_for(cfg, load_tokenizer(folder))
print(json.dumps([data.cache_hit, [data[i] for i in range(len(data))]]))
"""


def start(tokenizer_dir, path, cache, processes=1):
    words = [sys.executable, "-c", LOAD, *map(str, (tokenizer_dir, path, cache, processes))]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def words(path, rows):
    return write_jsonl(path, [{"text": f"word {n}"} for n in range(rows)])


def entries(cache):
    return sorted(path.name for path in (cache / "tokenised").glob("*"))


def test_a_hit_and_what_changes_the_fingerprint(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"class {n}"} for n in range(40)])

    def load(**fields):
        fields = {"format": "fim", "path": str(path), "cache_dir": str(tmp_path / "c"), **fields}
        return load_dataset_for(DataConfig(**fields), tokenizer)

    first, second = load(), load()
    assert not first.cache_hit and second.cache_hit and list(first) == list(second)
    assert load(max_bad_fraction=0.5).cache_hit
    assert not load(max_length=64).cache_hit
    assert not load(fim_spm_rate=0.5).cache_hit
    tokenizer.chat_template = "{{ messages }}"
    assert not load().cache_hit
    words(path, 39)
    assert not load().cache_hit
    assert len(entries(tmp_path / "c")) == 5
    # mapped, not read
    assert second.sources[0].entry.table.cache_files


def test_a_damaged_entry_is_rebuilt(tmp_path, tokenizer):
    path = words(tmp_path / "d.jsonl", 40)
    cfg = DataConfig(format="plain", path=str(path), cache_dir=str(tmp_path))
    expected = list(load_dataset_for(cfg, tokenizer))
    ((entry,),) = [(tmp_path / "tokenised").iterdir()]
    (entry / "rows.arrow").write_bytes(b"")
    again = load_dataset_for(cfg, tokenizer)
    assert not again.cache_hit and list(again) == expected


def test_an_unwritable_cache_names_the_remedy(tmp_path, tokenizer):
    path = words(tmp_path / "d.jsonl", 40)
    (tmp_path / "cache").write_text("a file where the folder should be")
    cfg = DataConfig(format="plain", path=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(EagleError, match="set data.cache_dir or"):
        load_dataset_for(cfg, tokenizer)


def test_of_two_processes_one_builds_the_entry(tmp_path, tokenizer_dir):
    path, cache = words(tmp_path / "d.jsonl", 3000), tmp_path / "cache"
    started = [start(tokenizer_dir, path, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    (hit, first), (other_hit, second) = (json.loads(out) for out, _ in outputs)
    assert first == second and len(first) > 2900 and {hit, other_hit} == {False, True}
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_builder_leaves_no_entry_and_no_lock(tmp_path, tokenizer_dir, processes):
    """kill -9: no half entry is found, and the next one builds it at once."""
    path, cache = words(tmp_path / "d.jsonl", 100_000), tmp_path / "cache"
    process = start(tokenizer_dir, path, cache, processes)
    while not list(cache.glob("tokenised/.*/tmp*")) and process.poll() is None:
        time.sleep(0.01)  # until rows are being written
    process.kill()
    process.communicate(timeout=60)  # until its children have closed its output, too
    assert process.returncode == -signal.SIGKILL
    assert all(name.startswith(".") for name in entries(cache))
    words(path, 100)
    after = start(tokenizer_dir, path, cache, processes)
    out, error = after.communicate(timeout=120)
    assert after.returncode == 0, error
    assert not json.loads(out)[0]


def test_a_killed_builder_leaves_no_process_that_waits_for_work():
    code = """
import time, multiprocess
from records.cache import children_end_with_us
with children_end_with_us():
    pool = multiprocess.Pool(2)
print("ready", flush=True)
time.sleep(600)
"""
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.communicate(timeout=60)[0] == ""


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_tokenises_the_same(tmp_path, tokenizer, processes):
    rng, lines = random.Random(0), []
    pieces = ["def", "class", "é", "x = 1"]
    for n in range(2600):
        text = " ".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))
        lines.append("{oops" if n % 97 == 5 else json.dumps({"text": text if n % 50 else ""}))
    path = write_jsonl(tmp_path / "d.jsonl", lines)
    found = []
    for count in (1, processes):
        out = tmp_path / str(count)
        cfg = DataConfig(format="plain", path=str(path), cache_dir=str(out), num_proc=count)
        data = load_dataset_for(cfg, tokenizer, out_dir=out)
        found.append((list(data), data.digest, (out / "quarantine.jsonl").read_bytes()))
    assert found[0] == found[1] and data.stats["bad"] == 79 and data.stats["records"] == 2600


def test_a_process_that_is_killed_ends_the_tokenising(tmp_path, tokenizer, monkeypatch):
    path = words(tmp_path / "d.jsonl", 2000)

    def die(record):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("records.dataset.make_renderer", lambda *_: die)
    cfg = DataConfig(format="plain", path=str(path), cache_dir=str(tmp_path / "cache"), num_proc=2)
    with pytest.raises(EagleError, match="lower data.num_proc"):
        load_dataset_for(cfg, tokenizer)
    assert entries(tmp_path / "cache") == []
