"""Preferences: what becomes a pair, that training begins at the reference, and that something is
learned.
"""

import json
import random

import pytest
from data_helpers import REFUSED
from finetune_helpers import QUICK, go, losses_of, rows_of, same, summary_of, text, write_lines
from safetensors.torch import load_file

from configs.finetune_schema import PreferenceData
from eagle.errors import EagleError
from eagle.loading import WEIGHTS
from records.rows import RowError
from train.finetune.assistant import write_example
from train.finetune.preference import build_pairs, render_pair

CFG = PreferenceData(max_length=96)
PASSAGES = [" ".join(f"w{n}{k}" for n in range(40)) for k in "ab"]


def pair(chosen, rejected, prompt=None, **more):
    sides = {"chosen": chosen, "rejected": rejected}
    return {**sides, **more} if prompt is None else {"prompt": prompt, **sides}


def answers(tokenizer, record, cfg=CFG):
    pair = render_pair(record, tokenizer, cfg)
    return tokenizer.batch_decode([pair.chosen_ids, pair.rejected_ids, pair.prompt_ids])


def test_without_a_template_a_pair_has_the_alpaca_form(tokenizer):
    tokenizer.chat_template = None
    *sides, prompt = answers(tokenizer, pair("yes", "no", "is it?"))
    assert sides == ["yes<|endoftext|>", "no<|endoftext|>"] and "### Instruction" in prompt


@pytest.mark.parametrize("record, reason", REFUSED["pairs"])
def test_pairs_that_prefer_nothing_are_set_aside(tokenizer, record, reason):
    with pytest.raises(RowError, match=reason):
        render_pair(record, tokenizer, CFG)


@pytest.mark.parametrize("room", [30, 120, 2000])
def test_passages_are_cut_and_the_question_never(tokenizer, room):
    record = pair({"text": "the right answer"}, {"text": "no"}, query="what is it for?")
    passages = [PASSAGES[0], {"text": "short"}, PASSAGES[1]]
    bare = render_pair({**record, "retrieval_result": ["."] * 3}, tokenizer, CFG)
    length = room + len(bare.prompt_ids) + len(bare.chosen_ids)
    cfg, record = PreferenceData(max_length=length), {**record, "retrieval_result": passages}
    found = render_pair(record, tokenizer, cfg)
    used = len(found.prompt_ids) + len(found.chosen_ids)
    chosen, _, prompt = answers(tokenizer, record, cfg)
    assert used <= length and chosen == "the right answer<|im_end|>"
    assert prompt.count("what is it for?") == 1 and "[2] short" in prompt
    if room == 2000:
        assert found.passages_cut == 0 and PASSAGES[0] in prompt and PASSAGES[1] in prompt
    else:  # what is left is the beginning, and the room is used
        assert found.passages_cut == 2 and "[1] w0a" in prompt and PASSAGES[0] not in prompt
        assert used > length - 8


def test_the_best_is_set_against_the_worst_and_ties_give_nothing(tmp_path, capsys):
    def build(records, **options):
        path, out = write_lines(tmp_path / "scored.jsonl", records), tmp_path / "pairs.jsonl"
        assert build_pairs(str(path), str(out), **options) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    def scored(prompt, **samples):
        return {"prompt": prompt, "samples": [{"text": t, "score": s} for t, s in samples.items()]}

    records = [
        scored("p", b=0.5, a=1.0, c=0.0, d=0.4),
        scored("tied", x=1, y=1),
        scored("one", x=1),
        {"prompt": "flat", "text": "good", "score": 2},
        {"prompt": "flat", "text": "bad", "score": 1},
        {"prompt": "flat", "text": "bad ", "score": 0},  # one text with two scores
        {"prompt": "flat", "text": "no score"},
    ]
    found = [list(line.values()) for line in build(records)]
    assert found == [["p", "a", "c", 1.0, 0.0], ["flat", "good", "bad", 2.0, 0.5]]
    assert "2 pairs of 4 prompts, 2 prompts tied, 1 samples unusable" in capsys.readouterr().out
    assert len(build(records, per_prompt=2)) == 3
    assert len(build(records[:1], per_prompt=2, margin=0.2)) == 1
    with pytest.raises(EagleError, match="no preference"):
        build(records[1:3])


# runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rng = random.Random(0)
    records = [pair(text(rng, 4), text(rng, 3), f"say {text(rng, 3)}") for _ in range(40)]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


def test_training_begins_at_the_sft_adapter_and_resumes_exactly(base, whole, pairs, tmp_path):
    """The first margin is 0 to the last bit, and moves from the adapter's answers, not from the
    base's.
    """
    found, train = {}, {"max_steps": 4, "save_every": 2, "save_total_limit": 9, "lr": 1e-2}
    more = {"data": {"heldout_fraction": 0.2}, "train": train}
    for adapter, quantization in ((str(whole), "nf4"), (None, "nf4"), (str(whole), "none")):
        model = {"adapter": adapter, "quantization": quantization}
        output = go("dpo", base, pairs, tmp_path / f"{len(found)}", model=model, **more)
        first, (start, last) = rows_of(output)[0], rows_of(output, evaluations=True)
        assert first["rewards/margins"] == first["rewards/chosen"] == 0.0
        assert start["eval_reward_margin"] == start["eval_reward_chosen"] == 0.0
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert last["eval_reward_margin"] != 0 and 0 <= last["eval_reward_accuracy"] <= 1
        found[adapter, quantization] = first["logps/chosen"]
    assert abs(found[str(whole), "nf4"] - found[None, "nf4"]) > 0.1

    first = tmp_path / "0"
    train["resume"] = str(first / "checkpoints" / "checkpoint-2")
    again = go("dpo", base, pairs, tmp_path / "again", model={"adapter": str(whole)}, **more)
    assert losses_of(again) == losses_of(first)[2:]
    assert same(again / "adapter", first / "adapter")
    ours, tuned = (load_file(run / "adapter" / WEIGHTS) for run in (first, whole))
    assert ours.keys() == tuned.keys()  # the reference is not in it


@pytest.mark.slow
def test_real_preferences_are_learned(tmp_path):
    """The embedded model in NF4 learns to prefer what a docstring says to the same with an error in
    it.
    """
    files = []
    for split, limit in (("train", 64), ("eval", 8)):
        lines = write_example("preferences", split, tmp_path)[0].read_text().splitlines()
        kept = [r for r in map(json.loads, lines) if "prompt" in r]
        kept.sort(key=lambda r: len(str(r)))
        start = len(kept) // 6  # short, but not the shortest
        files.append(write_lines(tmp_path / f"{split}.jsonl", kept[start : start + limit]))
    more = {"data": {"eval_path": str(files[1]), "max_length": 192}, "lora": {"r": 8}}
    train = {**QUICK, "batch_size": 4, "lr": 5e-3}
    output = go("dpo", None, files[0], tmp_path / "run", train=train, **more)
    before, after = (summary_of(output)[k] for k in ("heldout_before", "heldout_after"))
    assert before["reward_margin"] == 0 and before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert after["loss"] < 0.68 and after["reward_accuracy"] > 0.6 and after["reward_margin"] > 0.04
