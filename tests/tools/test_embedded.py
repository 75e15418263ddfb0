"""The embedded model's corpus, data sets and training, on a small folder of sources."""

import json
import random

import pytest

import eagle
from eagle.loading import EMBEDDED
from tools.embedded import corpus
from tools.embedded.build import datasets
from tools.embedded.pretrain import pretrain

DATA = EMBEDDED / "data"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of forty documented modules: enough for a few to be held out."""
    root = tmp_path_factory.mktemp("stdlib")
    function = (
        'def step_{i}_{j}(value, other={j}):\n    """Return the value of step {j} in {i}."""\n'
        "    scaled = value * {j} + 1\n    total = scaled + other\n    return total - {i}\n\n\n"
    )
    for i in range(40):
        body = "".join(function.format(i=i, j=j) for j in range(6))
        (root / f"module_{i}.py").write_text(f'"""Module {i}."""\n\nimport math\n\n\n{body}')
    (root / "bad_syntax.py").write_text("def (:\n" * 60)
    return root


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_split_is_by_rule_and_complete(sources):
    files = corpus.stdlib_files(sources)
    train, held_out = corpus.split(files)
    assert len(files) == 40  # the broken file is left out
    assert held_out and len(train) + len(held_out) == 40
    assert all(corpus.is_heldout(f.path) for f in held_out)
    assert not any(corpus.is_heldout(f.path) for f in train)


def test_fim_records_join_to_their_window(sources):
    rng = random.Random(1)
    file = corpus.stdlib_files(sources)[0]
    for window in [*corpus.code_windows(file, rng, 500)] * 20:
        made = corpus.record("fim", (file, window), rng)
        whole = made["prefix"] + made["middle"] + made["suffix"]
        assert whole == window or len(made["middle"]) == 400


def test_data_sets_hold_no_held_out_source(sources, tmp_path, capsys):
    sizes = dict(root=str(sources), count=30, heldout=10, prompts=3)
    datasets(out=str(tmp_path), **sizes)
    counts = json.loads(capsys.readouterr().out)
    assert counts["fim"] == 30 and counts["heldout_chat"] > 0
    for kind in ("chat", "fim", "instruction"):
        train, held_out = (rows(tmp_path / f"{name}{kind}.jsonl") for name in ("", "heldout_"))
        assert not any(corpus.is_heldout(r["source"]) for r in train)
        assert all(corpus.is_heldout(r["source"]) for r in held_out)
    again = tmp_path / "again"
    datasets(out=str(again), **sizes)
    assert (again / "fim.jsonl").read_bytes() == (tmp_path / "fim.jsonl").read_bytes()


def test_shipped_data_keeps_to_the_split():
    listed = set((EMBEDDED / "heldout.txt").read_text().split())
    assert listed and all(corpus.is_heldout(path) for path in listed)
    for kind in ("chat", "fim", "instruction"):
        used = {row["source"] for row in rows(DATA / f"{kind}.jsonl")}
        held_out = {row["source"] for row in rows(DATA / f"heldout_{kind}.jsonl")}
        assert not used & listed
        assert held_out <= listed
    assert {row["source"] for row in rows(DATA / "prompts.jsonl")} <= listed


def test_shipped_files_are_small():
    size = sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file())
    assert size <= 40e6, f"{size / 1e6:.1f} MB"


@pytest.mark.slow
def test_pretraining_learns_saves_and_loads(sources, tmp_path):
    small = dict(layers=4, hidden=64, vocab_size=400, seq_len=64, batch_size=4, compile=False)
    pretrain(out=str(tmp_path), root=str(sources), minutes=0.1, **small)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] > 3 and report["config"]["minutes"] == 0.1
    assert report["heldout"]["nats_per_token"] < 5.5  # ln 400 = 5.99 is knowing nothing
    assert not (tmp_path / "pretrain_state.pt").exists()
    model = eagle.EaModel.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    prompt = model.tokenizer("def step_1_2(value", return_tensors="pt").input_ids
    assert model.naivegenerate(prompt, max_new_tokens=4).shape[1] <= prompt.shape[1] + 4
