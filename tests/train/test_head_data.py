"""Data, tokenizers and numbers that have led trainers astray, each met by a whole run."""

import json
import math
import random

import numpy as np
import pytest
import torch
from data_helpers import with_tokenizer, write_jsonl
from head_helpers import WORDS, config, losses_of, require_same_tensors, rows_of, trained
from safetensors.torch import load_file
from transformers import AutoTokenizer

from eagle.checkpoint import load_head
from eagle.errors import EagleError
from records import load_tokenizer
from train.head import accumulate, loop
from train.head.accumulate import Accumulator
from train.head.engine import Engine
from train.head.setup import build, choose_draft_vocab, coverage, describe
from train.main import run


def draft_ids(run_folder):
    return load_head(run_folder / "head")[0].draft_token_ids().tolist()


def test_a_loss_that_is_not_finite_names_the_row_that_it_came_from(
    base, data, tmp_path, monkeypatch
):
    """One row's hidden states are not a number: that row is named, with its line, and no other."""
    bad = []
    states, forward = accumulate.hidden_and_features, Accumulator.forward

    def poisoned(source, ids, mask):
        hidden, features = states(source, ids, mask)
        hidden.split(mask.sum(1).tolist())[1][:] = math.nan
        return hidden, features

    def kept(self, batch, *rest):
        bad.append(batch)
        return forward(self, batch, *rest)

    monkeypatch.setattr(accumulate, "hidden_and_features", poisoned)
    monkeypatch.setattr(Accumulator, "forward", kept)
    with pytest.raises(EagleError, match="the loss is nan at step 1, micro batch 1 of 2") as error:
        run(config(base, data, tmp_path / "run", grad_accum=2), quiet=True)
    _, row = bad[0].places[1]
    named = str(error.value).split("rows ")[1].split(";")[0]
    assert named.startswith(f"{row} ({data}:") and named.count("jsonl") == 1
    line = int(named.split("jsonl:")[1].rstrip(")"))
    prefix = json.loads(data.read_text().splitlines()[line - 1])["prefix"]
    assert prefix.strip() in load_tokenizer(str(base)).decode(bad[0].input_ids[1])


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_checkpoint_has_it(
    base, data, tmp_path, monkeypatch
):
    update, steps = Engine.update, []

    def counted(self):
        steps.append(1)
        return math.inf if len(steps) == 4 else update(self)

    monkeypatch.setattr(Engine, "update", counted)
    with pytest.raises(EagleError, match="the gradient.* at step 4.*lower train.lr.*is whole"):
        run(config(base, data, tmp_path / "run", save_every=2, batch_size=12), quiet=True)
    state = load_file(tmp_path / "run/checkpoints/step-2/state.safetensors")
    assert all(v.isfinite().all() for k, v in state.items() if k.startswith("weights/"))
    assert not (tmp_path / "run/checkpoints/step-4").exists()


def test_draft_vocabulary_keeps_specials_then_frequent_then_lowest():
    counts = np.array([0, 5, 0, 9, 0, 0, 1, 0])
    for size, ids in ((3, [1, 3, 7]), (6, [0, 1, 2, 3, 6, 7])):
        assert choose_draft_vocab(counts, [7], size).tolist() == ids
    fim, chats = np.array([5, 0, 5, 0]), np.array([0, 9, 1, 0])
    report = coverage(fim + chats, np.array([0, 2]), [3], {"fim": fim, "chat": chats})
    assert report["coverage_by_source"] == {"fim": 1.0, "chat": 0.1}
    assert report["special_tokens"] == 0 and report["coverage"] == 11 / 20
    assert describe(report).endswith("hold 55.00% of what is supervised (fim 100.00%, chat 10.00%)")


def test_special_tokens_are_always_in_the_draft_vocabulary(base, data, tmp_path):
    """Chat tokens occur nowhere in FIM data, and every id of a small vocabulary has a better
    claim."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    few = {"max_steps": 1, "model": {"draft_vocab_size": 16}}
    kept = draft_ids(trained(base, data, tmp_path / "run", **few))
    assert len(kept) == 16 and set(tokenizer.added_tokens_decoder) <= set(kept)
    few["model"] = {"draft_vocab_size": 3}
    with pytest.raises(EagleError, match="cannot hold the .* special tokens; raise it"):
        run(config(base, data, tmp_path / "no", **few), quiet=True)


def test_a_warm_start_keeps_the_draft_vocabulary_on_other_data(base, data, tmp_path):
    """A draft id must mean what it meant, whatever the new data would choose."""
    rng = random.Random(0)
    spell = [" ".join(rng.choice(WORDS) for _ in range(6)).upper() for _ in range(60)]
    rows = [{"prefix": "x", "middle": text, "suffix": "y"} for text in spell]
    other, small = write_jsonl(tmp_path / "o.jsonl", rows), {"draft_vocab_size": 40}
    warm = {"draft_vocab_size": None, "init_head": str(tmp_path / "first/head")}
    runs = (("first", data, small), ("fresh", other, small), ("warm", other, warm))
    first, fresh, warmed = (
        draft_ids(trained(base, path, tmp_path / name, max_steps=1, model=model))
        for name, path, model in runs
    )
    assert warmed == first != fresh
    cfg = config(base, other, tmp_path / "x", model=warm)
    assert "covers little of this data" in build(cfg, None, torch.device("cpu")).notes[-1]


def test_the_padding_token_means_nothing(base, data, tmp_path):
    """Padding is known by length: with pad = eos the end token is learnt all the same."""

    def seen(name, model):
        rows = rows_of(trained(model, data, tmp_path / name, max_steps=2))
        return [x for row in rows for x in (row["loss"], row["targets"])]

    found = seen("as-it-is", base)
    for n, pad in enumerate(["<|endoftext|>", None, "def"]):

        def change(tokenizer, pad=pad):
            tokenizer.pad_token = pad

        other = with_tokenizer(base, tmp_path / f"base{n}", change)
        assert seen(f"changed{n}", other) == pytest.approx(found, rel=1e-6)


def test_the_best_head_is_chosen_by_acceptance_and_not_by_loss(base, data, tmp_path, monkeypatch):
    """The loss falls throughout, the acceptance length rises and falls: the middle one is kept."""
    taus = iter([1.0, 1.5, 2.5, 1.2])
    measure = loop.acceptance
    monkeypatch.setattr(loop, "acceptance", lambda *a: {**measure(*a), "tau": next(taus)})
    more = {"max_steps": 30, "eval_every": 10, "save_total_limit": 1, "lr": 3e-3, "batch_size": 16}
    few = {"num_prompts": 1, "max_new_tokens": 4}
    output = trained(base, data, tmp_path / "run", eval=few, **more)
    losses = losses_of(output)
    assert losses[29] < losses[19] < losses[9]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best"] == {"checkpoint": "step-20", "tau": 2.5}
    kept, used = (output / x / "model.safetensors" for x in ("checkpoints/step-20/head", "head"))
    require_same_tensors(kept, used)


def test_too_little_supervision_is_refused(base, data, tmp_path):
    cfg = config(base, data, tmp_path / "run", data_more={"min_supervised_tokens": 10**6})
    with pytest.raises(EagleError, match=r"supervises \d+ tokens, fewer than data.min_supervised"):
        run(cfg, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_teaches_nothing_takes_part_all_the_same(base, tmp_path):
    """Its only target is the second token, which no head can draft. Every parameter must still have
    a gradient, or ranks wait for each other."""
    nothing = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 0]}
    rows = [{"input_ids": [n, 6, 7, 8, 9, 10], "loss_mask": [0, 0, 0, 1, 1, 1]} for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *[nothing] * 120])
    more = {"zero": 3, "max_steps": 12, "batch_size": 1, "grad_accum": 2}
    more["data_more"] = {"format": "tokenized", "heldout_fraction": 0.0}
    losses = losses_of(trained(base, path, tmp_path / "run", **more))
    assert 0.0 in losses and max(losses) > 0  # some steps teach nothing at all


def test_token_ids_outside_the_target_s_vocabulary_name_their_rows(base, tmp_path):
    """A tokenizer may hold more ids than the model has embeddings."""
    sizes = []

    def change(tokenizer):
        sizes.append(len(tokenizer))
        tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])

    other, ids = with_tokenizer(base, tmp_path / "base", change), list(range(20))
    good = [{"input_ids": ids, "loss_mask": [0] + [1] * 19} for _ in range(20)]
    bad = {"input_ids": [*ids, sizes[0] + 30], "loss_mask": [0] + [1] * 20}
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, bad])
    more = {"batch_size": 7, "grad_accum": 3}
    more["data_more"] = {"format": "tokenized", "heldout_fraction": 0.0}
    with pytest.raises(EagleError, match=r"rows.jsonl:21: .*outside the target's vocabulary"):
        run(config(other, path, tmp_path / "run", **more), quiet=True)
