import json
from collections import Counter

import pytest
import torch
from data_helpers import chat, write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import Collator, MixtureDataset, load_dataset_for
from records.mixture import RoundRobin

SOURCES = [[f"a{n}" for n in range(5)], [f"b{n}" for n in range(23)], ["c"]]


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*mixture, split="train"):
        folder = str(tmp_path / "cache")
        cfg = DataConfig(format="mixed", mixture=list(mixture), cache_dir=folder)
        return load_dataset_for(cfg, tokenizer, split=split)

    return load


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("weights", [None, [1, 1, 1], [3, 1, 1], [1, 10, 0.5]])
def test_runs_until_all_sources_are_exhausted(weights, block, monkeypatch):
    monkeypatch.setattr("records.mixture.BLOCK", block)
    mixture = MixtureDataset(SOURCES, weights, seed=1)
    seen = Counter(mixture[i] for i in range(len(mixture)))
    assert set(seen) == {row for source in SOURCES for row in source}
    for source in SOURCES:  # a row comes again only after all others of its source
        counts = [seen[row] for row in source]
        assert max(counts) - min(counts) <= 1
    shares = weights or [1, 1, 1]
    for source, weight in zip(SOURCES, shares, strict=True):
        share = sum(seen[row] for row in source) / len(mixture)
        assert share == pytest.approx(weight / sum(shares), abs=0.03)


def test_blocks_have_their_share_and_long_epochs_cost_nothing(monkeypatch):
    rare = MixtureDataset(SOURCES, [1, 1e-10, 1])
    assert len(rare) > 10**11 and len({rare[10**11 + n] for n in range(99)}) == 6
    with pytest.raises(EagleError, match="1e-20 of 2.*source 2 has been seen whole; raise its wei"):
        MixtureDataset(SOURCES, [1, 1e-20, 1])
    monkeypatch.setattr("records.mixture.BLOCK", 7)
    mixture = MixtureDataset(SOURCES, [3, 1, 1], seed=1)
    order = [mixture.locate(n)[0] for n in range(len(mixture))]
    assert {order[n : n + 7].count(0) for n in range(0, len(order) - 7, 7)} <= {3, 4, 5, 6}


def test_is_a_pure_function_of_seed_epoch_and_position():
    first, second = MixtureDataset(SOURCES, seed=1), MixtureDataset(SOURCES, seed=1)
    order = list(first[i] for i in range(len(first)))
    second.set_epoch(1)
    assert order != [second[i] for i in range(len(second))]
    second.set_epoch(0)
    assert [second[i] for i in range(17, len(second))] == order[17:]
    assert order != [MixtureDataset(SOURCES, seed=2)[i] for i in range(len(order))]


def test_bad_mixtures_and_the_order_of_evaluation():
    with pytest.raises(EagleError, match="empty"):
        MixtureDataset([[1], []])
    with pytest.raises(EagleError, match="positive"):
        MixtureDataset([[1]], [0])
    assert len(RoundRobin([])) == 0
    turns = RoundRobin([["a", "b", "d"], ["c"]])
    assert [turns[i] for i in range(len(turns))] == ["a", "c", "b", "d"]


def test_mixed_format_from_files(tmp_path, load):
    chats = write_jsonl(tmp_path / "c.jsonl", [chat("Hi?", f"Hello {n}") for n in range(30)])
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": f"word {n}"} for n in range(10)])
    mixture = [{"format": "chat", "path": str(chats)}, {"format": "plain", "path": str(texts)}]
    data, held = load(*mixture), load(*mixture, split="eval")
    formats = Counter(data[i]["format"] for i in range(len(data)))
    assert formats["chat"] == formats["plain"] == max(len(s) for s in data.sources)
    assert {held[0]["format"], held[1]["format"]} == {"chat", "plain"}
    before = [data[i] for i in range(len(data))]
    data.set_epoch(1)
    assert before != [data[i] for i in range(len(data))]


def test_sources_are_named_weighted_and_located(tmp_path, tokenizer, load):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": f"word {n}"} for n in range(20)])
    more = ["{", *({"text": f"more {n} of it"} for n in range(30))]
    second = write_jsonl(tmp_path / "b.jsonl", more)
    held = write_jsonl(tmp_path / "e.jsonl", [{"text": "held out"}])
    mixture = [
        {"format": "plain", "path": str(first), "weight": 2, "loss_weight": 0.5},
        {"format": "plain", "path": str(second)},
        {"format": "plain", "path": str(first), "name": "again", "eval_path": str(held)},
    ]
    data, rows = load(*mixture), load(*mixture, split="eval")
    assert [source.name for source in data.sources] == ["plain", "plain 2", "again"]
    seen = Counter()
    for i in range(len(data)):
        row = data[i]
        seen[row["source"]] += 1
        assert row["loss_weight"] == (0.5 if row["source"] == 0 else 1.0)
        assert data.length(i) == len(row["input_ids"])
        file, line = data.where(i).rsplit(":", 1)
        text = json.loads((tmp_path / file).read_text().splitlines()[int(line) - 1])["text"]
        assert text in tokenizer.decode(row["input_ids"])
    assert seen[0] == pytest.approx(2 * seen[1], abs=2) and seen[1] == pytest.approx(seen[2], abs=2)
    assert len(rows.sources[2]) == 1 and len(data.sources[2]) == 20
    # what is drawn twice as often counts twice
    counts = [source.token_counts(len(tokenizer)) for source in data.sources]
    repeats = [seen[n] / len(source) for n, source in enumerate(data.sources)]
    expected = sum(c * r for c, r in zip(counts, repeats, strict=True)).round()
    assert (data.token_counts(len(tokenizer)) == expected).all()


def test_the_digest_is_of_the_records_and_their_shares(tmp_path, load):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"word {n}"} for n in range(20)])

    def digest(**source):
        one = {"format": "plain", "path": str(path)}
        return load(one, {**one, **source}).digest

    before = digest()
    assert digest(loss_weight=2) == before != digest(weight=2)
    write_jsonl(path, [{"text": f"word {n}"} for n in range(1, 21)])
    assert digest() != before


def test_collator_pads_by_length_and_says_where_rows_are_from():
    rows = [
        {"input_ids": [7, 0, 0], "loss_mask": [0, 1, 1]},  # ends with real tokens equal to pad
        {"input_ids": [8, 9], "loss_mask": [0, 1], "source": 2, "loss_weight": 0.25},
    ]
    batch = Collator(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[7, 0, 0], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [False, True, False]]
    assert batch["input_ids"].dtype == torch.int64 and batch["loss_mask"].dtype == torch.bool
    assert batch["source"].tolist() == [0, 2] and batch["loss_weight"].tolist() == [1.0, 0.25]


@pytest.mark.parametrize("multiple, width", [(1, 3), (2, 4), (3, 3), (64, 64)])
def test_collator_rounds_the_width_up(multiple, width):
    batch = Collator(0, multiple)([{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}])
    assert batch["input_ids"].shape == (1, width) and batch["attention_mask"].sum() == 3
