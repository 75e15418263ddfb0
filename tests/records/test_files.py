import json

import pytest
from data_helpers import chat, write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for
from records.sources import read_records, resolve

GOOD = [{"prefix": f"a = {n}\n", "middle": "b = 2\n", "suffix": "c\n"} for n in range(40)]


@pytest.fixture
def config(tmp_path):
    def make(path, **fields):
        fields = {"format": "fim", "heldout_fraction": 0, **fields}
        return DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **fields)

    return make


def test_jsonl_array_and_parquet_hold_the_same(tmp_path, tokenizer, config):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d.json").write_text(json.dumps(GOOD))
    write_jsonl(tmp_path / "d.jsonl", GOOD)
    pq.write_table(pa.Table.from_pylist(GOOD), tmp_path / "d.parquet")
    rows = [
        list(load_dataset_for(config(tmp_path / f"d.{kind}"), tokenizer))
        for kind in ("json", "jsonl", "parquet")
    ]
    assert len(rows[0]) == 40 and rows[0] == rows[1] == rows[2]
    assert {"input_ids", "loss_mask", "format"} <= set(rows[0][0])
    assert rows[0][0]["format"] == "fim"


def test_bad_lines_are_named_and_quarantined(tmp_path, tokenizer, config):
    bad = ['{"prefix": ', "[1]", {"prefix": "a", "suffix": "b"}]
    path = write_jsonl(tmp_path / "d.jsonl", GOOD[:20] + bad + GOOD[20:])
    cfg = config(path, max_bad_fraction=0.1)
    data = load_dataset_for(cfg, tokenizer, out_dir=tmp_path / "run")
    assert (data.stats["rows"], data.stats["bad"], data.stats["records"]) == (40, 3, 43)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["where"] for entry in entries] == [f"{path}:{n}" for n in (21, 22, 23)]
    assert entries[0]["message"].startswith("malformed JSON") and entries[0]["raw"] == bad[0]
    assert "not a JSON object" in entries[1]["message"]
    assert "missing field 'middle'" in entries[2]["message"] and entries[2]["remedy"]
    again = load_dataset_for(cfg, tokenizer, out_dir=tmp_path / "run2")
    assert again.cache_hit and (tmp_path / "run2" / "quarantine.jsonl").read_text()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["quarantine.jsonl"]


def test_too_many_bad_rows_stop_with_a_diagnosis(tmp_path, tokenizer, config):
    path = write_jsonl(tmp_path / "d.jsonl", [*GOOD[:10], "{oops", "{oops"])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(EagleError) as error:
            load_dataset_for(config(path), tokenizer, out_dir=tmp_path / "run")
        text = str(error.value)
        assert "2 of 12 rows" in text and f"{path}:11" in text and "2 x malformed JSON" in text
        assert "max_bad_fraction" in text and "quarantine.jsonl" in text and "\n" not in text
    assert len(load_dataset_for(config(path, max_bad_fraction=0.5), tokenizer)) == 10


def test_all_masked_data_is_refused(tmp_path, tokenizer, config):
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}] * 3
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(EagleError, match="all 3 rows are unusable: 3 x all-zero loss mask"):
        load_dataset_for(config(path, format="tokenized", max_bad_fraction=1.0), tokenizer)


def test_truncation_is_counted(tmp_path, tokenizer, config, caplog):
    records = [chat("Hi?", "word " * 100), chat("Hi?", "short")]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    data = load_dataset_for(config(path, format="chat", max_length=32), tokenizer)
    assert data.stats["truncated"] == 1 and data.stats["rows"] == 2
    assert "1 of 2 train rows did not fit" in caplog.text
    assert data.stats["tokens"] == sum(len(row["input_ids"]) for row in data)
    assert data.stats["supervised_tokens"] == sum(sum(row["loss_mask"]) for row in data)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.jsonl", None, "no such data file"),
        ("d.csv", "a,b", "unknown data file type '.csv'"),
        ("d.jsonl", "", "the data set is empty"),
        ("d.json", "[]", "the data set is empty"),
        ("d.json", '[{"a": 1},', "d.json:1: malformed JSON"),
        ("d.json", "3", "all 1 rows are unusable"),
        ("d.json", '"text"', "must hold an array"),
        ("d.parquet", "nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path, tokenizer, config, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    if content == "3":
        message = "must hold an array"
    with pytest.raises(EagleError, match=message):
        load_dataset_for(config(tmp_path / name), tokenizer)


def test_folder_stands_for_its_files_and_bytes_are_checked(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n{"text": "\xff"}\n')
    (tmp_path / "notes.txt").write_text("ignored")
    [path] = resolve([tmp_path])
    first, second = read_records(path)
    assert first.value == {"text": "x"} and second.line == 3 and "not UTF-8" in second.error


def test_held_out_rows_never_train(tmp_path, tokenizer, config):
    path = write_jsonl(tmp_path / "d.jsonl", GOOD * 2)  # every record twice
    cfg = config(path, heldout_fraction=0.2)
    train = {tuple(row["input_ids"]) for row in load_dataset_for(cfg, tokenizer)}
    held = {tuple(row["input_ids"]) for row in load_dataset_for(cfg, tokenizer, split="eval")}
    assert held and train and not held & train and len(held | train) == 40


def test_small_data_still_holds_out_one(tmp_path, tokenizer, config):
    path = write_jsonl(tmp_path / "d.jsonl", GOOD[:2])
    cfg = config(path, heldout_fraction=0.001)
    assert len(load_dataset_for(cfg, tokenizer)) == 1
    assert len(load_dataset_for(cfg, tokenizer, split="eval")) == 1
    with pytest.raises(EagleError, match="data.eval_path"):
        load_dataset_for(config(path), tokenizer, split="eval")


def test_eval_path_leaves_the_training_data_whole(tmp_path, tokenizer, config):
    path = write_jsonl(tmp_path / "d.jsonl", GOOD[:30])
    cfg = config(path, eval_path=str(write_jsonl(tmp_path / "e.jsonl", GOOD[30:])))
    cfg = cfg.model_copy(update={"heldout_fraction": 0.5})
    assert len(load_dataset_for(cfg, tokenizer)) == 30
    assert len(load_dataset_for(cfg, tokenizer, split="eval")) == 10


def test_token_counts(tmp_path, tokenizer, config):
    path = write_jsonl(tmp_path / "d.jsonl", GOOD)
    data = load_dataset_for(config(path), tokenizer)
    counts = data.token_counts(len(tokenizer))
    assert counts.sum() == data.stats["supervised_tokens"]
    assert counts[tokenizer.eos_token_id] == 40


def test_formats_without_shipped_data(tokenizer):
    with pytest.raises(EagleError, match="no plain data set is shipped: give data.path"):
        load_dataset_for(DataConfig(format="plain"), tokenizer)
