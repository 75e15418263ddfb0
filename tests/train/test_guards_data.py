"""Data, tokenizers and templates that have led trainers astray, each met by a whole run."""

import json
import random
import shutil

import pytest
from data_helpers import chat, write_jsonl
from head_helpers import WORDS, config, losses_of
from safetensors.torch import load_file
from transformers import AutoTokenizer

from eagle.checkpoint import load_head, read_json
from eagle.errors import EagleError
from train.head import loop
from train.main import run


def draft_ids(run_folder):
    return load_head(run_folder / "head")[0].draft_token_ids().tolist()


def with_tokenizer(base, folder, change):
    """The model of `base` with its tokenizer changed."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", ["eos", "none", "own"])
def test_the_padding_token_means_nothing(base, data, tmp_path, pad):
    """Padding is known by length: with pad = eos the end token is learnt, without a pad token all
    works.
    """

    def change(tokenizer):
        tokenizer.pad_token = {"eos": tokenizer.eos_token, "none": None, "own": "def"}[pad]

    found = []
    for name, model in (
        ("as-it-is", base),
        ("changed", with_tokenizer(base, tmp_path / "m", change)),
    ):
        assert run(config(model, data, tmp_path / name, max_steps=3), quiet=True) == 0
        found.append(losses_of(tmp_path / name))
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[-1] += [json.loads(line)["targets"] for line in metrics]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_special_tokens_are_always_in_the_draft_vocabulary(base, data, tmp_path):
    """Chat tokens occur nowhere in FIM data, and every id of a small vocabulary has a better
    claim.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    cfg = config(base, data, tmp_path / "run", max_steps=1, model={"draft_vocab_size": 16})
    assert run(cfg, quiet=True) == 0
    kept = draft_ids(tmp_path / "run")
    assert len(kept) == 16 and set(tokenizer.added_tokens_decoder) <= set(kept)
    cfg = config(base, data, tmp_path / "no", max_steps=1, model={"draft_vocab_size": 3})
    with pytest.raises(EagleError, match="cannot hold the .* special tokens; raise it"):
        run(cfg, quiet=True)


def test_fewer_distinct_tokens_than_the_draft_vocabulary_holds(base, tmp_path):
    path = write_jsonl(
        tmp_path / "few.jsonl",
        [{"prefix": f"a{n}", "middle": "b b b", "suffix": ""} for n in range(60)],
    )
    cfg = config(base, path, tmp_path / "run", max_steps=2, model={"draft_vocab_size": 200})
    assert run(cfg, quiet=True) == 0
    assert len(set(draft_ids(tmp_path / "run"))) == 200
    report = json.loads((tmp_path / "run/summary.json").read_text())["draft_vocabulary"]
    assert report["distinct_supervised"] < 10 and report["coverage"] == 1.0


def test_a_warm_start_keeps_the_draft_vocabulary_on_other_data(base, data, tmp_path):
    """A draft id must mean what it meant, whatever the new data would choose."""
    rng = random.Random(0)
    spell = [" ".join(rng.choice(WORDS) for _ in range(6)).upper() for _ in range(60)]
    other = write_jsonl(
        tmp_path / "o.jsonl", [{"prefix": "x", "middle": text, "suffix": "y"} for text in spell]
    )
    small = {"draft_vocab_size": 40}
    assert run(config(base, data, tmp_path / "first", max_steps=1, model=small), quiet=True) == 0
    assert run(config(base, other, tmp_path / "fresh", max_steps=1, model=small), quiet=True) == 0
    warm = {"draft_vocab_size": None, "init_head": str(tmp_path / "first/head")}
    assert run(config(base, other, tmp_path / "warm", max_steps=1, model=warm), quiet=True) == 0
    assert draft_ids(tmp_path / "warm") == draft_ids(tmp_path / "first")
    assert draft_ids(tmp_path / "fresh") != draft_ids(tmp_path / "first")


@pytest.mark.parametrize(
    "on_policy, said", [(True, "written by the target"), (False, "as in the data")]
)
def test_the_head_says_who_wrote_the_answers(base, data, tmp_path, on_policy, said):
    cfg = config(base, data, tmp_path / "run", max_steps=1, data_more={"on_policy": on_policy})
    assert run(cfg, quiet=True) == 0
    assert read_json(tmp_path / "run/head/eagle.json")["data"]["answers"] == said


def test_the_best_head_is_chosen_by_acceptance_and_not_by_loss(base, data, tmp_path, monkeypatch):
    """The loss falls throughout, the acceptance length rises and falls: the middle one is kept."""
    taus = iter([1.0, 1.5, 2.5, 1.2])
    measure = loop.acceptance
    monkeypatch.setattr(loop, "acceptance", lambda *a: {**measure(*a), "tau": next(taus)})
    cfg = config(
        base,
        data,
        tmp_path / "run",
        max_steps=30,
        eval_every=10,
        save_total_limit=1,
        lr=3e-3,
        batch_size=16,
        eval={"num_prompts": 1, "max_new_tokens": 4},
    )
    assert run(cfg, quiet=True) == 0
    losses = losses_of(tmp_path / "run")
    assert losses[29] < losses[19] < losses[9]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best"] == {"checkpoint": "step-20", "tau": 2.5}
    kept = load_file(tmp_path / "run/checkpoints/step-20/head/model.safetensors")
    used = load_file(tmp_path / "run/head/model.safetensors")
    assert all((kept[k] == used[k]).all() for k in kept)


def test_data_that_is_masked_all_over_is_refused(base, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]} for _ in range(9)]
    path = write_jsonl(tmp_path / "masked.jsonl", rows)
    cfg = config(base, path, tmp_path / "run", data_more={"format": "tokenized"})
    with pytest.raises(EagleError, match="all 9 rows are unusable: 9 x all-zero loss mask"):
        run(cfg, quiet=True)
    assert (tmp_path / "run/quarantine.jsonl").exists() and not (tmp_path / "run/head").exists()


def test_a_file_of_several_formats_names_the_lines(base, tmp_path):
    fim = [{"prefix": "a", "middle": "b c d", "suffix": "e"} for _ in range(8)]
    path = write_jsonl(tmp_path / "both.jsonl", [*fim, chat("Hi?", "Yes."), *fim])
    with pytest.raises(EagleError, match=r"1 of 17 .* missing field 'prefix'.*both.jsonl:9"):
        run(config(base, path, tmp_path / "run"), quiet=True)


def test_a_template_that_drops_turns_is_refused(base, tmp_path):
    def last_turn_only(tokenizer):
        tokenizer.chat_template = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

    model = with_tokenizer(base, tmp_path / "model", last_turn_only)
    rows = [chat(f"Hi {n}?", "Yes, hello.", "And?", "No, never.") for n in range(30)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    cfg = config(model, path, tmp_path / "run", data_more={"format": "chat"})
    with pytest.raises(
        EagleError, match="all 30 rows are unusable.*chat template.*drops or repeats"
    ):
        run(cfg, quiet=True)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_batch_that_teaches_nothing_takes_part_all_the_same(base, tmp_path, zero):
    """Its only target is the second token, which no head can draft. Every parameter must still have
    a gradient, or ranks wait for each other."""
    nothing = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 0]}
    rows = [{"input_ids": [n, 6, 7, 8, 9, 10], "loss_mask": [0, 0, 0, 1, 1, 1]} for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *[nothing] * 120])
    cfg = config(
        base,
        path,
        tmp_path / "run",
        zero=zero,
        max_steps=24,
        batch_size=1,
        grad_accum=2,
        data_more={"format": "tokenized", "heldout_fraction": 0.0},
    )
    assert run(cfg, quiet=True) == 0
    losses = losses_of(tmp_path / "run")
    assert 0.0 in losses and max(losses) > 0  # some steps teach nothing at all
