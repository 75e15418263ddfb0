"""Broken rows and files through the path that training takes: each is accepted, quarantined with a
reason or refused in one line, and none is lost."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "A"}]
GOOD = {
    "chat": {"messages": TURNS},
    "instruction": {"instruction": "Add 1 and 2", "input": "quickly", "output": "It is 3."},
    "fim": {"prefix": "a = 1\n", "middle": "b = 2\n", "suffix": "c = 3\n"},
    "plain": {"text": "def f():\n    return 1\n"},
    "tokenized": {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 1]},
}
ODD = [None, True, 0, -1, 0.5, 10**30, float("nan"), "", " ", "\0", "\ud83d", "e\u0301" * 9, [], {}]
ODD += ["x" * 9999, "<|im_end|><|fim_middle|>", [[]], [None], ["a"], {"a": {"b": []}}, "\ufeff"]
PIECES = '" \\ { } , null NaN \\ud800 \xff \0 \r'.split(" ") + ["[" * 2000, "9" * 5000]
MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\x00\x00\xfe\xff", b"\0"]


def spoilt(rng, row):
    """A line: a value replaced or taken out, or one place of the text changed."""
    at = row = json.loads(json.dumps(row))
    if rng.random() < 0.4:
        line, place = json.dumps(row).encode(), rng.randrange(len(json.dumps(row)))
        piece = rng.choice(PIECES).encode("latin-1")
        return line[:place] + piece + line[place + rng.randrange(3) :]
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], (dict, list)) or rng.random() < 0.3:
            break
        at = at[key]
    at[key] = rng.choice(ODD)
    if rng.random() < 0.2:
        del at[key]
    return json.dumps(row).encode()


def files(rows):
    """Good files: extension -> bytes."""
    text = "\n".join(row["text"] for row in rows).encode()
    lines, table = (
        "".join(json.dumps(row) + "\n" for row in rows).encode(),
        pa.Table.from_pylist(rows),
    )
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    found = {"jsonl": lines, "json": json.dumps(rows, indent=1).encode(), "txt": text, "py": text}
    found |= {"csv": b"text,id\n" + b'"%s",1\n' % text * 9, "tsv": b"text\tid\n" + b"a\tb\n" * 9}
    found |= {
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "jsonl.zst": pa.compress(lines, "zstd", True),
    }
    return found | {"parquet": bytes(parquet.getvalue()), "arrow": bytes(arrow.getvalue())}


def damaged(rng, data):
    place, kind, size = rng.randrange(len(data)), rng.randrange(7), rng.choice([1, 1, 2, 40])
    if kind == 0:
        return data[:place]
    if kind == 1:
        return rng.choice(MARKS) + data
    if kind == 2:
        return data.decode("latin-1").encode(rng.choice(["utf-16", "utf-32", "utf-16-le"]))
    if kind == 3:
        return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n"]))
    return data[:place] + rng.randbytes(size) + data[place + (size if kind < 6 else 0) :]


@pytest.fixture
def account(tmp_path, tokenizer):
    def account(path, data_format):
        """How many rows are accepted and quarantined, which are all; None: the file is refused."""
        given = {"format": data_format, "path": str(path), "cache_dir": str(tmp_path / "cache")}
        cfg = DataConfig(**given, max_bad_fraction=1.0, heldout_fraction=0)
        try:
            data = load_dataset_for(cfg, tokenizer, out_dir=tmp_path / "out")
        except EagleError as error:
            assert str(error) and "\n" not in str(error)
            return None
        good, bad = {data.where(n) for n in range(len(data))}, {b.where for b in data.bad_rows}
        assert all(row.reason and row.remedy for row in data.bad_rows) and not good & bad
        assert len(good) + len(bad) == data.stats["records"]
        return len(good), len(bad)

    return account


@pytest.mark.parametrize("data_format", GOOD)
def test_rows(tmp_path, account, data_format):
    rng = random.Random(data_format)
    lines = [spoilt(rng, GOOD[data_format]) for _ in range(70)]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    good, bad = account(tmp_path / "d.jsonl", data_format)
    assert good + bad == 70 and good and bad


def test_files(tmp_path, account):
    rng, found = random.Random(0), []
    good = files([{"text": f"line {n} of it\nsecond é\n", "id": n} for n in range(30)])
    for number, name in enumerate(list(good) * 15):
        path = tmp_path / f"{number}.{name}"
        path.write_bytes(damaged(rng, good[name]))
        found.append(account(path, "plain"))
    assert 20 < found.count(None) < 130 and any(one and one[1] for one in found)
