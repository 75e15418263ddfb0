import json
import os
import shutil

import numpy as np
import pytest
from data_helpers import DATA, chat, write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for
from records.dataset import held_out_rows, tell_shared
from records.sources import read_records, resolve

GOOD = [{"prefix": f"a = {n}\n", "middle": "b = 2\n", "suffix": "c\n"} for n in range(40)]


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(data, split="train", out=None, **fields):
        """data: records, or a file."""
        path = write_jsonl(tmp_path / "d.jsonl", data) if isinstance(data, list) else data
        fields = {"format": "fim", "heldout_fraction": 0, "path": str(path), **fields}
        cfg = DataConfig(cache_dir=str(tmp_path / "cache"), **fields)
        return load_dataset_for(cfg, tokenizer, split=split, out_dir=out)

    return load


FILES = DATA / "files"  # the same six records in each
NAMES = [p.name for p in FILES.iterdir() if p.stem not in ("document", "splits", "hub")]
NAMES += ["splits:train", "splits/train", "*.parquet", "**/rows.tsv", "org/name", "org/name:train"]


def layout(name):
    return name if name.startswith("org/") else str(FILES / name)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_hold_the_same(tmp_path, load, monkeypatch, name):
    cache = shutil.copytree(FILES / "hub", tmp_path / "hub")  # the library puts locks there
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    [expected], found = resolve([FILES / "rows.jsonl"]), load(layout(name))
    assert list(found) == list(load(expected)) and len(found) == 6


@pytest.mark.parametrize(
    "name, message",
    [
        ("splits", "has the splits train, test; name one: .*splits:train"),
        ("splits:nope", "has the splits train, test"),
        ("org/none", "no such data file, and no hub data set that can be loaded"),
        ("*.nothing", "no file matches this pattern"),
        ("{tmp}/loop.jsonl", "no such data file"),
        ("{tmp}/links", "links/a.jsonl: cannot read this file: No such file"),
        ("{tmp}/pipe.json", "no such data file"),
    ],
)
def test_places_that_are_refused(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.jsonl").symlink_to("nowhere")
    with pytest.raises(EagleError, match=message) as error:
        resolve([layout(name.format(tmp=tmp_path))])
    assert "\n" not in str(error.value)


def test_source_code_and_texts(tmp_path, caplog, load):
    code = tmp_path / "code"
    for name in "a.py deep/b.rs node_modules/c.js .git/d.py README.md package.json".split():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_bytes(b"x = 1\r\ny = 2\n")
    odd = {"gen.py": b"# DO NOT EDIT\n1", "bin.c": b"\0", "empty.py": b"", "latin.py": b"\xe9"}
    odd["big.py"] = b"x = 1\n" * 200_000
    for name, data in odd.items():
        (code / name).write_bytes(data)
    (code / "link.py").symlink_to(code / "a.py")
    (code / "deep/up").symlink_to(tmp_path)
    files = resolve([code], "fim")
    assert [path.name for path in files] == ["a.py", "b.rs"]
    for kind in ("generated", "binary", "empty", "not UTF-8", "larger", "lin"):
        assert f"1 {kind}" in caplog.text
    assert "3 folders" in caplog.text
    assert len(resolve([code], "plain")) == 3 and resolve([code], "chat") == [code / "package.json"]
    assert next(read_records(files[0])).value == {"text": "x = 1\ny = 2\n"}
    assert len(load(code).paths) == 2
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfWhy?\r\n\r\nHow?\r\n")
    asked = [(r.line, r.value) for r in read_records(tmp_path / "q.txt", "chat")]
    assert asked == [(1, {"prompt": "Why?"}), (3, {"prompt": "How?"})]


def test_bad_lines_are_named_and_quarantined(tmp_path, load):
    bad = ['{"prefix": ', "[1]", {"prefix": "a", "suffix": "b"}]
    (tmp_path / "notes.txt").write_text("ignored")
    mixed, more = GOOD[:20] + bad + GOOD[20:], {"max_bad_fraction": 0.1}
    data = load(mixed, out=tmp_path / "run", **more)
    assert (data.stats["rows"], data.stats["bad"], data.stats["records"]) == (40, 3, 43)
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["where"] for e in entries] == [f"{tmp_path / 'd.jsonl'}:{n}" for n in (21, 22, 23)]
    assert entries[0]["message"].startswith("malformed JSON") and entries[0]["raw"] == bad[0]
    assert "not a JSON object" in entries[1]["message"]
    assert "missing field 'middle'" in entries[2]["message"] and entries[2]["remedy"]
    assert load(mixed, out=tmp_path / "run2", **more).cache_hit
    assert (tmp_path / "run2/quarantine.jsonl").read_text()


def test_too_many_bad_rows_stop_with_a_diagnosis(tmp_path, load):
    bad = [*GOOD[:10], "{oops", "{oops"]
    for _ in range(2):  # the second time from the cache
        with pytest.raises(EagleError) as error:
            load(bad, out=tmp_path / "run")
        text = str(error.value)
        assert "2 of 12 rows" in text and "d.jsonl:11" in text and "2 x malformed JSON" in text
        assert "max_bad_fraction" in text and "quarantine.jsonl" in text and "\n" not in text
    assert len(load(bad, max_bad_fraction=0.5)) == 10
    masked = [{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}] * 3
    with pytest.raises(EagleError, match="all 3 rows are unusable: 3 x all-zero loss mask"):
        load(masked, format="tokenized", max_bad_fraction=1.0)


def test_truncation_is_counted(load, caplog):
    records = [chat("Hi?", "word " * 100), chat("Hi?", "short")]
    data = load(records, format="chat", max_length=32)
    assert data.stats["truncated"] == 1 and data.stats["rows"] == 2
    assert "1 of 2 train rows did not fit" in caplog.text
    assert data.stats["tokens"] == sum(len(row["input_ids"]) for row in data)
    assert data.stats["supervised_tokens"] == sum(sum(row["loss_mask"]) for row in data)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.jsonl", None, "no such data file"),
        ("d.xlsx", "a,b", "neither a .jsonl, .* file nor a folder"),
        ("d.jsonl", "", "the data set is empty"),
        ("d.json", "[]", "the data set is empty"),
        ("d.json", '[{"a": 1},', "d.json:1: malformed JSON"),
        ("d.json", "3", "must hold an array"),
        ("d.parquet", "nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path, load, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EagleError, match=message):
        load(tmp_path / name)


def test_held_out_rows_never_train(tmp_path, load):
    def split(data, **more):
        return [[tuple(x["input_ids"]) for x in load(data, s, **more)] for s in ("train", "eval")]

    train, held = map(set, split(GOOD * 2, heldout_fraction=0.2))  # every record twice
    assert held and train and not held & train and len(held | train) == 40
    one, other = split(GOOD[:2], heldout_fraction=0.001)  # one is held out all the same
    assert len(one) == len(other) == 1
    with pytest.raises(EagleError, match="data.eval_path"):
        load(GOOD[:2], "eval")
    own = str(write_jsonl(tmp_path / "e.jsonl", GOOD[30:]))  # takes none away
    assert list(map(len, split(GOOD[:30], heldout_fraction=0.5, eval_path=own))) == [30, 10]


@pytest.mark.parametrize("fraction", [0.02, 0.3])
@pytest.mark.parametrize("copies", [[], [500], [200] * 3, [30] * 20, [3] * 200])
def test_the_held_out_share_is_kept_whatever_is_there_twice(copies, fraction):
    rng = np.random.default_rng(len(copies))
    for _ in range(20):
        keys, new = rng.integers(0, 2**62, 3000), rng.integers(0, 2**62, 900)
        rows = np.concatenate([keys, *map(np.repeat, keys, copies)])
        held = held_out_rows(rows, fraction)
        assert not set(rows[held]) & set(rows[~held])
        if copies:
            assert held.mean() == pytest.approx(fraction, rel=0.26)
        else:  # nothing that is added moves a record
            assert (held_out_rows(np.append(keys, new), fraction)[:3000] == held).all()


def test_rows_that_are_held_out_and_trained_on_are_told(tmp_path, load, caplog):
    copied = [{**row, "id": n} for n, row in enumerate(GOOD)]
    own = str(write_jsonl(tmp_path / "e.jsonl", [*copied[:4], {**GOOD[0], "middle": "other\n"}]))
    sides = [load(GOOD, split, eval_path=own).content for split in ("train", "eval")]
    tell_shared(*sides)
    assert "4 of 5 held-out rows are also trained on" in caplog.text


def test_token_counts(load, tokenizer):
    data = load(GOOD)
    counts = data.token_counts(len(tokenizer))
    assert counts.sum() == data.stats["supervised_tokens"]
    assert counts[tokenizer.eos_token_id] == 40
    with pytest.raises(EagleError, match="no plain data set is shipped: give data.path"):
        load(GOOD, format="plain", path=None)
