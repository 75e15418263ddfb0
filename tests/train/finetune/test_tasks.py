"""Task records: what becomes a row, what is set aside, what the example data says."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from data_helpers import REFUSED, runs
from finetune_helpers import TASKS, task_records, write_lines

from configs.errors import ConfigError
from configs.finetune_schema import DpoConfig, MultitaskConfig, SftConfig, TaskConfig, TaskData
from configs.load import load_config
from eagle.errors import EagleError
from records.rows import RowError
from train.finetune import assistant
from train.finetune.run import load_rows
from train.finetune.tasks import count_labels, measure_task, render_record
from train.head.distributed import World

TASK_LIST = [TaskConfig.model_validate(t) for t in TASKS]
ANSWER, KIND, SCORE, RANK = range(4)
ALONE = World(0, 1, torch.device("cpu"))


def render(record, tokenizer, tasks=TASK_LIST, length=96):
    return {tasks[row.task].name: row for row in render_record(record, tasks, tokenizer, length)}


def read(path, tokenizer, **data):
    """What `load_rows` makes of a file: (rows, held out, card)."""
    data = TaskData.model_validate({"path": str(path), **data})
    cfg, out = SimpleNamespace(data=data), path.parent
    run = SimpleNamespace(cfg=cfg, output=out, world=ALONE, vocab_size=500)
    return load_rows(run, "tasks", lambda r: render_record(r, TASK_LIST, tokenizer, 96))


def test_a_generation_is_a_chat_with_the_answer_supervised(tokenizer):
    row = render({"text": "a b", "answer": "the answer"}, tokenizer)["answer"]
    assert runs(tokenizer, (row.sequences[0], row.mask)) == ["the answer<|im_end|>"]
    assert row.task == ANSWER and not row.labels
    tokenizer.chat_template = None
    row = render({"text": "a b", "answer": "the answer"}, tokenizer)["answer"]
    assert runs(tokenizer, (row.sequences[0], row.mask)) == ["the answer<|endoftext|>"]


def test_a_record_gives_a_row_to_each_task_that_has_its_label(tokenizer):
    both = render({"text": "a b", "kind": "c", "score": 0}, tokenizer)  # zero is a label
    assert {name: row.labels for name, row in both.items()} == {"kind": [2.0], "score": [0.0]}
    one = render({"text": "a b", "kind": None, "score": 0.5}, tokenizer)
    assert one.keys() == {"score"} and one["score"].labels == [0.5]
    text = tokenizer.decode(one["score"].sequences[0], skip_special_tokens=False)
    assert text.startswith("<|im_start|>user") and text.endswith("Judge: a b")


@pytest.mark.parametrize(
    "text, other",
    [
        ("猫坐在垫子上", "猫睡在垫子上"),
        ("قطة على السجادة", "قطة تحت السجادة"),
        ("बिल्ली चटाई पर", "बिल्ली मेज़ पर"),
        ("кот на ковре", "кот под ковром"),
        ("a cat", "a dog"),
    ],
    ids=["chinese", "arabic", "hindi", "cyrillic", "latin"],
)
def test_answers_in_any_script_are_measured_as_evaluation_does(text, other):
    from inference.evaluation.metrics import with_references

    task = TaskConfig.model_validate(TASKS[0])
    lines = [{"prediction": text, "label": label} for label in (text, other)]
    ours = measure_task(task, lines)["rouge_l"]
    assert 0.5 < ours < 1 and ours == with_references([text, text], [text, other])["rouge_l"]


def test_a_ranking_has_a_sequence_for_each_candidate(tokenizer):
    record = {"text": "q", "options": ["x one", "y two", "z three"], "order": [0, 2, 1]}
    row = render(record, tokenizer)["rank"]  # a sequence for each candidate
    assert len(row.sequences) == 3 and row.labels == [0, 2, 1]
    assert "Rank y two for q" in tokenizer.decode(row.sequences[1])

    given = {**TASKS[KIND], "classes": [True, False], "template": "{text}?"}  # as YAML reads them
    task = TaskConfig.model_validate(given)
    assert task.classes == ["true", "false"]
    assert render({"text": "a", "kind": False}, tokenizer, [task])["kind"].labels == [1.0]


@pytest.mark.parametrize("record, reason", REFUSED["tasks"])
def test_wrong_records_say_why(tokenizer, record, reason):
    with pytest.raises(RowError, match=reason):
        render(record, tokenizer)


def test_bad_records_are_counted_written_and_limited(tokenizer, tmp_path):
    records = [*task_records(20), {"text": "a", "score": "high"}, {"text": "b"}]
    path, out = write_lines(tmp_path / "rows.jsonl", records), tmp_path / "quarantine.jsonl"
    path.write_text(path.read_text() + "{torn\n")
    rows, held, card = read(path, tokenizer, max_bad_fraction=0.5, heldout_fraction=0.2)
    keys, other = ({row.key for row in part} for part in (rows, held))
    assert card["records"] == 23 and card["bad"] == 3 and keys and other
    assert len(keys | other) == 20 and not keys & other  # records are held out whole
    labels = count_labels(rows + held, TASK_LIST, "training")
    assert labels["answer"] == 5 and labels["rank"] == 5
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [21, 22, 23]
    with pytest.raises(EagleError, match="3 of 23 rows are unusable"):
        read(path, tokenizer)
    with pytest.raises(EagleError, match="no training record has a label for rank"):
        count_labels([row for row in rows if row.task != RANK], TASK_LIST, "training")


@pytest.mark.parametrize("change, named", REFUSED["registry"])
def test_a_registry_that_is_wrong_is_refused(tmp_path, change, named):
    task = {k: v for k, v in {**TASKS[KIND], **change}.items() if k != "metric" or v is not None}
    path = tmp_path / "tasks.yaml"
    for tasks, said in (([task], named), ([TASKS[KIND]] * 2, "two tasks have one name")):
        path.write_text(json.dumps({"tasks": tasks}))
        with pytest.raises(ConfigError, match=said):
            load_config(MultitaskConfig, path)


def test_presets_load_and_settings_that_contradict_are_refused():
    tasks = load_config(MultitaskConfig, "writing_assistant", folder="finetune").tasks
    names = "summary_generation experiment_design error_detection logic_consistency readability"
    assert [t.name for t in tasks] == names.split()
    assert load_config(SftConfig, "qlora", folder="finetune").lora.r == 64
    assert load_config(DpoConfig, "dpo", folder="finetune").train.lr == 5e-5
    with pytest.raises(ConfigError, match="presets: dpo, pipeline, qlora, writing_assistant"):
        load_config(SftConfig, "nothing", folder="finetune")
    weighted = "data={format: mixed, mixture: [{format: fim, loss_weight: 2}]}"
    for cls, override, named in [
        (SftConfig, "train.early_stopping_patience=2", "set train.eval_every"),
        (SftConfig, weighted, "loss_weight"),
        (MultitaskConfig, "train.zero=3", "train.zero=2 or less"),
        (SftConfig, "lora.rank=3", "unknown config key lora.rank"),
    ]:
        with pytest.raises(ConfigError, match=named):
            load_config(cls, None, [override])


# the example data


def test_the_example_tasks_are_facts():
    for split, least in (("train", 1000), ("eval", 50)):
        functions, sentences = assistant.read_shipped(split)
        records = assistant.task_records(functions, sentences, random.Random(0))
        judged = [r for r in records if "error" in r]
        assert len(judged) >= least and {r["error"] for r in judged} == set(assistant.ERRORS)
        originals = {s["text"] for s in sentences}
        for record in judged:
            assert (record["text"] in originals) == (record["error"] == "none")
            assert (record["readability"] is None) == (record["error"] != "none")
        for record in records:
            if "consistent" in record:
                assert record["consistent"] == (record["premise"] == record["statement"])
            if "relevance" in record:
                assert sum(record["relevance"]) == 1 and len(set(record["experiments"])) >= 2
    trained, held = ({r["source"] for r in assistant.read_shipped(s)[1]} for s in ("train", "eval"))
    assert not trained & held
    text = "The cat sat on the mat. It was a sunny day."  # 11 words, 2 sentences, 12 syllables
    assert assistant.reading_ease(text) == pytest.approx(206.835 - 1.015 * 5.5 - 84.6 * 12 / 11)


def test_cards_are_facts():
    code = "    async def get(self, /, path, *rest, mode='r'):\n"
    code += "        return opened(self.find(path)).read(rest)"
    found = assistant.card({"code": code, "summary": "Read it."})
    assert found.pop("name") == "get" and found.pop("arguments") == ["self", "path", "mode"]
    assert found == {"calls": ["opened", "find", "read"], "summary": "Read it."}
    assert assistant.card({"code": "x = 1", "summary": ""}) is None
    assert assistant.card({"code": "def f(:", "summary": ""}) is None
    for split, least in (("train", 2000), ("eval", 150)):
        records = assistant.card_records(*assistant.read_shipped(split), random.Random(0))
        assert len(records) >= least
        for record in records:
            question, answer = (message["content"] for message in record["messages"])
            card = json.loads(answer)
            assert re.search(rf"def {card['name']}\s*\(", question)
            assert all(name in question for name in card["arguments"])
            assert all(re.search(rf"\b{name}\s*\(", question) for name in card["calls"])
