"""Broken rows and files through the path that training takes: each is accepted, quarantined with a
reason or refused in one line, and none is lost."""

import json
import random

import pytest
from data_helpers import DATA

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for

CASES = json.loads((DATA / "fuzz.json").read_text("utf-8"))
PIECES, ODD = [*CASES["pieces"], "[" * 2000, "9" * 5000], [*CASES["odd"], "x" * 9999]
GOOD, MARKS = CASES["good"], [b"\xef\xbb\xbf", b"\xff\xfe", b"\x00\x00\xfe\xff", b"\0"]


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
    good = sorted(path for path in (DATA / "files").rglob("*.*") if path.is_file())
    for number, path in enumerate(good * 5):
        (tmp_path / (name := f"{number}{path.name}")).write_bytes(damaged(rng, path.read_bytes()))
        found.append(account(tmp_path / name, "fim"))
    assert len(found) >= 150 and found.count(None) > 20 and any(one and one[1] for one in found)
