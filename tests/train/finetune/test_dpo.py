"""Preferences: what becomes a pair, that training begins at the reference, and that something is
learned.
"""

import json
import random

import pytest
import torch
from data_helpers import chat, runs
from finetune_helpers import config, go, losses_of, rows_of, summary_of, text, write_lines
from safetensors.torch import load_file

from configs.finetune_schema import PreferenceData
from eagle.errors import EagleError
from eagle.loading import WEIGHTS
from records.rows import RowError
from train.finetune import pairs as builder
from train.finetune.preference import bare_length, fair_shares, render_pair, renderer
from train.finetune.rows import read_rows

CFG = PreferenceData(max_length=96)
PASSAGES = [" ".join(f"w{n}{k}" for n in range(40)) for k in "abc"]


def answers(tokenizer, record, cfg=CFG):
    pair = render_pair(record, tokenizer, cfg)
    rows = (pair.chosen, pair.rejected)
    prompts = {tuple(row.input_ids[: row.loss_mask.index(1)]) for row in rows}
    assert len(prompts) == 1  # the same tokens up to the answer
    return [runs(tokenizer, row) for row in rows], tokenizer.decode(prompts.pop())


def test_text_and_messages_give_the_same_pair(tokenizer):
    expected = [["yes<|im_end|>"], ["no<|im_end|>"]]
    forms = [
        {"prompt": "is it?", "chosen": "yes", "rejected": "no"},
        {"prompt": chat("is it?")["messages"], "chosen": "yes", "rejected": {"content": "no"}},
        {"chosen": chat("is it?", "yes")["messages"], "rejected": chat("is it?", "no")["messages"]},
        {
            "prompt": "is it?",
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    ]
    found = [answers(tokenizer, form) for form in forms]
    assert all(supervised == expected for supervised, _ in found)
    assert len({prompt for _, prompt in found}) == 1


def test_only_the_last_answer_is_judged(tokenizer):
    turns = ("a", "first", "b")
    record = {"chosen": chat(*turns, "yes")["messages"], "rejected": chat(*turns, "no")["messages"]}
    supervised, prompt = answers(tokenizer, record)
    assert supervised == [["yes<|im_end|>"], ["no<|im_end|>"]] and "first" in prompt


def test_a_tokenizer_without_a_template_gets_alpaca(tokenizer):
    tokenizer.chat_template = None
    supervised, prompt = answers(tokenizer, {"prompt": "is it?", "chosen": "yes", "rejected": "no"})
    assert supervised == [["yes<|endoftext|>"], ["no<|endoftext|>"]] and "### Instruction" in prompt


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"prompt": "a", "chosen": "b"}, "missing field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "an answer is not text"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        ({"chosen": "b", "rejected": "c"}, "missing field 'prompt'"),
        ({"prompt": "a", "chosen": "b " * 99, "rejected": "c"}, "longer than data.max_length"),
        ({"prompt": "a " * 99, "chosen": "b", "rejected": "c"}, "max_length"),
        (
            {"chosen": chat("a", "x")["messages"], "rejected": chat("b", "y")["messages"]},
            "answer different prompts",
        ),
        (
            {
                "query": "a",
                "retrieval_result": [],
                "chosen": {"text": "b"},
                "rejected": {"text": "c"},
            },
            "not a non-empty list",
        ),
        (
            {
                "query": "a " * 99,
                "retrieval_result": ["p"],
                "chosen": {"text": "b"},
                "rejected": {"text": "c"},
            },
            "question and answer are longer",
        ),
    ],
)
def test_pairs_that_prefer_nothing_are_set_aside(tokenizer, record, reason):
    with pytest.raises(RowError, match=reason):
        render_pair(record, tokenizer, CFG)


@pytest.mark.parametrize("room", [30, 60, 120, 2000])
def test_passages_are_cut_and_the_question_never(tokenizer, room):
    record = {
        "query": "what is it for?",
        "retrieval_result": [PASSAGES[0], {"text": "short"}, PASSAGES[1]],
        "chosen": {"text": "the right answer"},
        "rejected": {"text": "no"},
    }
    texts = ("the right answer", "no")
    length = room + bare_length(record["query"], 3, texts, tokenizer, CFG)
    cfg = PreferenceData(max_length=length)
    pair = render_pair(record, tokenizer, cfg)
    assert max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)) <= length
    supervised, prompt = answers(tokenizer, record, cfg)
    assert supervised[0] == ["the right answer<|im_end|>"]
    assert prompt.count("what is it for?") == 1 and "[2] short" in prompt
    assert pair.passages_cut == (0 if room == 2000 else 2)
    if room == 2000:
        assert PASSAGES[0] in prompt and PASSAGES[1] in prompt
    else:  # what is left is the beginning, and the room is used
        assert "[1] w0a" in prompt and PASSAGES[0] not in prompt
        assert len(pair.chosen.input_ids) > length - 24


def test_room_is_shared_fairly():
    assert fair_shares([5, 50, 50], 45) == [5, 20, 20]
    assert fair_shares([50, 5, 10], 100) == [50, 5, 10]
    assert fair_shares([10, 10], 0) == [0, 0]
    assert sum(fair_shares([9, 9, 9], 10)) == 10


def test_bad_pairs_are_counted_written_and_limited(tokenizer, tmp_path):
    good = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(8)]
    bad = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
    ]
    path = write_lines(tmp_path / "pairs.jsonl", good + bad)
    render = renderer(tokenizer, CFG)
    found, card = read_rows([path], render, 0.3, tmp_path / "q.jsonl")
    assert len(found) == 8 and card["bad"] == 2
    assert card["bad_by_reason"] == {"chosen and rejected are equal": 1, "chosen is empty": 1}
    assert [json.loads(x)["line"] for x in (tmp_path / "q.jsonl").read_text().splitlines()] == [
        9,
        10,
    ]
    with pytest.raises(EagleError, match="2 of 10 rows are unusable"):
        read_rows([path], render, 0.05, None)


# pairs out of scored samples


def build(tmp_path, records, **options):
    path = write_lines(tmp_path / "scored.jsonl", records)
    assert builder.build(str(path), str(tmp_path / "pairs.jsonl"), **options) == 0
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def test_the_best_is_set_against_the_worst_and_ties_give_nothing(tmp_path, capsys):
    samples = [{"text": t, "score": s} for t, s in (("b", 0.5), ("a", 1.0), ("c", 0.0), ("d", 0.4))]
    records = [
        {"prompt": "p", "samples": samples},
        {"prompt": "tied", "samples": [{"text": "x", "score": 1}, {"text": "y", "score": 1}]},
        {"prompt": "one", "samples": [{"text": "x", "score": 1}]},
        {"prompt": "flat", "text": "good", "score": 2},
        {"prompt": "flat", "text": "bad", "score": 1},
        {"prompt": "flat", "text": "no score"},
    ]
    found = build(tmp_path, records)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found] == [
        ("p", "a", "c"),
        ("flat", "good", "bad"),
    ]
    assert "2 pairs of 4 prompts, 2 prompts tied, 1 samples unusable" in capsys.readouterr().out
    assert [p["score_chosen"] - p["score_rejected"] for p in found] == [1.0, 1.0]
    assert len(build(tmp_path, records, per_prompt=2)) == 3
    assert len(build(tmp_path, records[:1], per_prompt=2, margin=0.2)) == 1
    with pytest.raises(EagleError, match="no preference"):
        build(tmp_path, records[1:3])


def test_one_text_scored_twice_counts_once(tmp_path):
    samples = [{"text": "a", "score": 1}, {"text": "a ", "score": 0}, {"text": "b", "score": 0.5}]
    with pytest.raises(EagleError, match="no preference"):
        build(tmp_path, [{"prompt": "p", "samples": samples}])


# runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    records = [
        {"prompt": f"say {text(rng, 3)}", "chosen": text(rng, 4), "rejected": text(rng, 3)}
        for _ in range(40)
    ]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """An SFT adapter that is far from the base."""
    from finetune_helpers import instructions

    folder = tmp_path_factory.mktemp("sft")
    rows = instructions(folder / "rows.jsonl")
    return go("sft", base, rows, folder / "run", train={"max_steps": 4, "lr": 1e-2})


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_training_begins_at_the_sft_adapter(base, tuned, data, tmp_path, quantization):
    """The first margin is 0 to the last bit, and moves from the adapter's answers, not from the
    base's.
    """
    found = {}
    for name, adapter in (("tuned", str(tuned)), ("bare", None)):
        output = go(
            "dpo",
            base,
            data,
            tmp_path / name,
            data={"heldout_fraction": 0.2},
            model={"adapter": adapter, "quantization": quantization},
            train={"max_steps": 2, "batch_size": 4, "lr": 1e-2},
        )
        first, last = rows_of(output)[0], rows_of(output, evaluations=True)[-1]
        start = rows_of(output, evaluations=True)[0]
        assert first["rewards/margins"] == first["rewards/chosen"] == 0.0
        assert start["eval_reward_margin"] == start["eval_reward_chosen"] == 0.0
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert last["eval_reward_margin"] != 0 and 0 <= last["eval_reward_accuracy"] <= 1
        found[name] = first["logps/chosen"]
    assert abs(found["tuned"] - found["bare"]) > 0.1
    saved = load_file(tmp_path / "tuned" / "adapter" / WEIGHTS)
    assert (
        saved.keys() == load_file(tuned / "adapter" / WEIGHTS).keys()
    )  # the reference is not in it


def test_resume_keeps_the_reference(base, tuned, data, tmp_path):
    more = {"data": {"heldout_fraction": 0.2}, "model": {"adapter": str(tuned)}}
    train = {"max_steps": 4, "save_every": 2, "save_total_limit": 9, "lr": 1e-2}
    whole = go("dpo", base, data, tmp_path / "whole", train=train, **more)
    start = str(whole / "checkpoints" / "checkpoint-2")
    again = go("dpo", base, data, tmp_path / "again", train={**train, "resume": start}, **more)
    assert losses_of(again) == losses_of(whole)[2:]
    a, b = (load_file(run / "adapter" / WEIGHTS) for run in (again, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_rows_with_identical_answers_stop_a_run(base, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    with pytest.raises(
        EagleError, match="all 3 rows are unusable: 3 x chosen and rejected are equal"
    ):
        go("dpo", base, path, tmp_path / "run")


@pytest.mark.slow
def test_real_preferences_are_learned(tmp_path):
    """The embedded model in NF4 learns to prefer what a docstring says to the same with an error in
    it.
    """
    from train.finetune.assistant import shipped_file

    cfg, files = config("dpo", None, None, tmp_path / "run"), []
    for split, limit in (("train", 64), ("eval", 16)):
        lines = shipped_file(cfg.data, "preferences", split).read_text().splitlines()
        kept = sorted(
            (r for r in map(json.loads, lines) if "prompt" in r), key=lambda r: len(str(r))
        )
        start = len(kept) // 6  # short, but not the shortest
        files.append(write_lines(tmp_path / f"{split}.jsonl", kept[start : start + limit]))
    output = go(
        "dpo",
        None,
        files[0],
        tmp_path / "run",
        lora={"r": 8},
        data={"eval_path": str(files[1]), "max_length": 256},
        train={
            "max_steps": 6,
            "batch_size": 4,
            "lr": 5e-3,
            "grad_clip": 1.0,
            "gradient_checkpointing": False,
        },
    )
    before, after = (summary_of(output)[k] for k in ("heldout_before", "heldout_after"))
    assert before["reward_margin"] == 0 and before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert after["loss"] < 0.68 and after["reward_accuracy"] > 0.6 and after["reward_margin"] > 0.04
