"""The cache of tokenised rows: what it depends on, and several processes at one entry."""

import json
import os
import random
import signal
import time

import multiprocess
import pyarrow
import pytest
from data_helpers import write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import cache, load_dataset_for


def words(path, rows):
    return write_jsonl(path, [{"text": f"word {n}"} for n in range(rows)])


def entries(folder):
    return sorted(path.name for path in (folder / "tokenised").glob("*"))


def plain(path, folder, processes=1):
    return DataConfig(format="plain", path=str(path), cache_dir=str(folder), num_proc=processes)


def forked(work):
    """A process that does `work` -> its id, and a pipe that ends when it and its children have."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            work()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return pid, os.fdopen(read)


def killed(pid, pipe):
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with pipe:
        assert pipe.read() == ""  # the children have ended, too


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
    before = pyarrow.total_allocated_bytes()
    mapped = load().sources[0].entry.table
    assert pyarrow.total_allocated_bytes() - before < 1000 < mapped.nbytes  # not read


def test_a_damaged_entry_is_rebuilt_and_an_unwritable_cache_is_told(tmp_path, tokenizer):
    path = words(tmp_path / "d.jsonl", 40)
    expected = list(load_dataset_for(plain(path, tmp_path), tokenizer))
    ((entry,),) = [(tmp_path / "tokenised").iterdir()]
    (entry / "rows.arrow").write_bytes(b"")
    again = load_dataset_for(plain(path, tmp_path), tokenizer)
    assert not again.cache_hit and list(again) == expected
    with pytest.raises(EagleError, match="set data.cache_dir or"):
        load_dataset_for(plain(path, path), tokenizer)


def test_of_two_processes_one_builds_the_entry(tmp_path, tokenizer):
    path, folder = words(tmp_path / "d.jsonl", 3000), tmp_path / "cache"

    def load(number):
        data = load_dataset_for(plain(path, folder), tokenizer)
        (tmp_path / f"{number}.json").write_text(json.dumps([data.cache_hit, list(data)]))

    started = [forked(lambda n=n: load(n)) for n in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid, _ in started] == [0, 0]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first[1] == second[1] and {first[0], second[0]} == {False, True}
    assert len(first[1]) > 2900 and len(entries(folder)) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_builder_leaves_no_entry_no_lock_no_process(
    tmp_path, tokenizer, processes, monkeypatch
):
    """kill -9 while rows are written: no half entry is found, the next one builds it at once."""
    path, folder = words(tmp_path / "d.jsonl", 6000), tmp_path / "cache"
    cfg, render = plain(path, folder, processes), cache._render

    def slowly(*args, **options):
        time.sleep(0.3)
        return render(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_render", slowly)
        patch.setattr(cache, "BATCH", 300)
        pid, pipe = forked(lambda: load_dataset_for(cfg, tokenizer))
    written = []
    while not any(file.stat().st_size for file in written):
        time.sleep(0.01)
        written = list(folder.glob("tokenised/.*/tmp*"))
    killed(pid, pipe)
    assert entries(folder) and all(name.startswith(".") for name in entries(folder))
    assert not load_dataset_for(cfg, tokenizer).cache_hit
    assert len(entries(folder)) == 1


def test_a_killed_builder_leaves_no_process_that_waits_for_work(tmp_path):
    def wait():
        with cache.children_end_with_us():
            pool = multiprocess.Pool(2)
        (tmp_path / "ready").touch()
        time.sleep(600)
        pool.close()

    pid, pipe = forked(wait)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    killed(pid, pipe)


def test_any_number_of_processes_tokenises_the_same(tmp_path, tokenizer):
    rng, lines = random.Random(0), []
    pieces = ["def", "class", "é", "x = 1"]
    for n in range(2600):
        text = " ".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))
        lines.append("{oops" if n % 97 == 5 else json.dumps({"text": text if n % 50 else ""}))
    path = write_jsonl(tmp_path / "d.jsonl", lines)
    found = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        before = os.environ
        data = load_dataset_for(plain(path, out, processes), tokenizer, out_dir=out)
        assert os.environ is before  # what `datasets` puts there is not what others hold
        found.append((list(data), data.digest, (out / "quarantine.jsonl").read_bytes()))
    assert found[0] == found[1] and data.stats["bad"] == 79 and data.stats["records"] == 2600


def test_a_process_that_is_killed_ends_the_tokenising(tmp_path, tokenizer, monkeypatch):
    def die(record):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("records.dataset.make_renderer", lambda *_: die)
    with pytest.raises(EagleError, match="lower data.num_proc"):
        load_dataset_for(plain(words(tmp_path / "d.jsonl", 2000), tmp_path, 2), tokenizer)
    assert entries(tmp_path) == []
