"""Task records: what becomes a row, what is set aside, what the example data says."""

import json
import math
import random
import re

import pytest
from data_helpers import runs
from finetune_helpers import TASKS, config, task_records, write_lines

from configs.errors import ConfigError
from configs.finetune_schema import DpoConfig, MultitaskConfig, SftConfig, TaskConfig, TaskData
from configs.load import load_config
from eagle.errors import EagleError
from records.rows import RowError
from train.finetune import assistant
from train.finetune.multitask import mix
from train.finetune.rows import read_rows, split_rows
from train.finetune.task_metrics import measure_task
from train.finetune.tasks import by_kind, count_labels, render_record

TASK_LIST = [TaskConfig.model_validate(t) for t in TASKS]
ANSWER, KIND, SCORE, RANK = range(4)


def render(record, tokenizer, tasks=TASK_LIST, length=96):
    return {row.kind: row for row in render_record(record, tasks, tokenizer, length)}


def test_a_generation_is_a_chat_with_the_answer_supervised(tokenizer):
    row = render({"text": "a b", "answer": "the answer"}, tokenizer)["answer"]
    assert runs(tokenizer, (row.sequences[0], row.mask)) == ["the answer<|im_end|>"]
    assert row.task == ANSWER and not row.targets
    tokenizer.chat_template = None
    row = render({"text": "a b", "answer": "the answer"}, tokenizer)["answer"]
    assert runs(tokenizer, (row.sequences[0], row.mask)) == ["the answer<|endoftext|>"]


def test_tasks_of_one_template_share_a_row_and_missing_labels_stay_missing(tokenizer):
    both = render({"text": "a b", "kind": "c", "score": 0}, tokenizer)
    assert both.keys() == {"kind+score"}
    targets = both["kind+score"].targets[0]
    assert targets[KIND] == 2 and targets[SCORE] == 0.0  # zero is a label
    assert math.isnan(targets[ANSWER]) and math.isnan(targets[RANK])
    one = render({"text": "a b", "kind": None, "score": 0.5}, tokenizer)["score"]
    assert math.isnan(one.targets[0][KIND]) and one.targets[0][SCORE] == 0.5
    text = tokenizer.decode(one.sequences[0], skip_special_tokens=False)
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
    row = render(record, tokenizer)["rank"]
    assert len(row.sequences) == 3 and [t[RANK] for t in row.targets] == [0, 2, 1]
    assert "Rank y two for q" in tokenizer.decode(row.sequences[1])


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": "a", "kind": "d"}, "label 'kind' is not one of a, b, c"),
        ({"text": "a", "kind": 1.5}, "label 'kind' is not one of"),
        ({"text": "a", "score": "high"}, "label 'score' is not a finite number"),
        ({"text": "a", "score": True}, "label 'score' is not a finite number"),
        ({"text": "a", "score": math.inf}, "label 'score' is not a finite number"),
        ({"text": "a", "answer": 3}, "label 'answer' is not text"),
        ({"text": "a", "answer": " "}, "label 'answer' is not text"),
        ({"text": ["a"], "score": 1}, "field 'text' is not text"),
        ({"text": "q", "options": ["x", "y"], "order": [1, 1]}, "do not rank"),
        ({"text": "q", "options": ["x", "y"], "order": [1]}, "do not rank"),
        ({"text": "q", "options": ["x", "y"], "order": "yx"}, "label 'order' is not a list"),
        ({"text": "q", "options": "x", "order": [1, 2]}, "one field must be a list"),
        ({"text": "a"}, "no task takes this record"),
        ({"text": "a " * 99, "score": 1}, "longer than data.max_length"),
        ({"text": "a", "answer": "a " * 99}, "longer than data.max_length"),
    ],
)
def test_wrong_records_say_why(tokenizer, record, reason):
    with pytest.raises(RowError, match=reason):
        render(record, tokenizer)


def test_classes_may_be_written_as_yaml_reads_them(tokenizer):
    given = {**TASKS[1], "classes": [True, False], "template": "{text}?"}
    task = TaskConfig.model_validate(given)
    assert task.classes == ["true", "false"]
    row = render({"text": "a", "kind": False}, tokenizer, [task])["kind"]
    assert row.targets[0] == [1.0]


def test_bad_records_are_counted_written_and_limited(tokenizer, tmp_path):
    records = [*task_records(20), {"text": "a", "score": "high"}, {"text": "b"}]
    path = write_lines(tmp_path / "rows.jsonl", records)
    path.write_text(path.read_text() + "{torn\n")

    def read(limit, out=None):
        return read_rows([path], lambda r: render_record(r, TASK_LIST, tokenizer, 96), limit, out)

    found, card = read(0.5, tmp_path / "q.jsonl")
    assert card["records"] == 23 and card["bad"] == 3 and len(found) == 20
    labels = count_labels(found, TASK_LIST, "training")
    assert labels["answer"] == 5 and labels["rank"] == 5
    lines = [json.loads(line)["line"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert lines == [21, 22, 23]
    with pytest.raises(EagleError, match="3 of 23 rows are unusable"):
        read(0.05)
    with pytest.raises(EagleError, match="no training record has a label for rank"):
        count_labels([row for row in found if row.kind != "rank"], TASK_LIST, "training")


def test_records_are_held_out_whole(tokenizer, tmp_path):
    records = [{"text": f"row {n}", "answer": "x", "kind": "a"} for n in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", records)
    found, _ = read_rows([path], lambda r: render_record(r, TASK_LIST, tokenizer, 96), 0, None)
    sides = split_rows(found, 0.25)
    keys = [{row.key for row in side} for side in sides]
    assert len(keys[0] | keys[1]) == 20 and all(keys) and not keys[0] & keys[1]
    assert all(len(side) == 2 * len(k) for side, k in zip(sides, keys, strict=True))
    assert [len(kind) for kind in by_kind(sides[0])] == [len(keys[0])] * 2


@pytest.mark.parametrize("temperature, share", [(1.0, 0.1), (2.0, 0.25), (1000.0, 0.5)])
def test_temperature_draws_rare_tasks_more_often(tmp_path, temperature, share):
    cfg = config("multitask", None, None, tmp_path, balance={"temperature": temperature})
    mixture = mix(cfg, [list(range(900)), list(range(100))])
    assert mixture.counts[1] / len(mixture) == pytest.approx(share, abs=0.01)
    assert {mixture[n] for n in range(len(mixture)) if mixture.order[n] == 0} == set(range(900))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"metric": None}, "metric"),
        ({"metric": "mae"}, "metric 'mae' does not measure a classification"),
        ({"loss": "mse"}, "loss 'mse' does not fit"),
        ({"classes": None}, "classes are what a classification has"),
        ({"classes": ["a", "a"]}, "distinct classes"),
        ({"template": "no field"}, "the template reads"),
        ({"template": "{text} {kind}", "fields": ["text", "kind"]}, "stands in the prompt"),
        ({"template": "{text"}, "template"),
        ({"kindd": 1}, "kindd"),
    ],
)
def test_a_registry_that_is_wrong_is_refused(tmp_path, change, named):
    task = {k: v for k, v in {**TASKS[1], **change}.items() if k != "metric" or v is not None}
    path = tmp_path / "tasks.yaml"
    path.write_text(json.dumps({"tasks": [task]}))
    with pytest.raises(ConfigError, match=named):
        load_config(MultitaskConfig, path)
    path.write_text(json.dumps({"tasks": [TASKS[1], TASKS[1]]}))
    with pytest.raises(ConfigError, match="two tasks have one name"):
        load_config(MultitaskConfig, path)


def test_presets_load():
    tasks = load_config(MultitaskConfig, "writing_assistant", folder="finetune").tasks
    assert [t.name for t in tasks] == [
        "summary_generation",
        "experiment_design",
        "error_detection",
        "logic_consistency",
        "readability",
    ]
    assert load_config(SftConfig, "qlora", folder="finetune").lora.r == 64
    assert load_config(DpoConfig, "dpo", folder="finetune").train.lr == 5e-5
    with pytest.raises(ConfigError, match="presets: dpo, pipeline, qlora, writing_assistant"):
        load_config(SftConfig, "nothing", folder="finetune")


def test_settings_that_contradict_are_refused():
    for cls, override, named in [
        (SftConfig, "train.early_stopping_patience=2", "set train.eval_every"),
        (
            SftConfig,
            "data={format: mixed, mixture: [{format: fim, loss_weight: 2}]}",
            "loss_weight",
        ),
        (MultitaskConfig, "train.zero=3", "train.zero=2 or less"),
        (SftConfig, "lora.rank=3", "unknown config key lora.rank"),
    ]:
        with pytest.raises(ConfigError, match=named):
            load_config(cls, None, [override])


# the example data


def test_the_example_tasks_are_facts(tokenizer):
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


def test_cards_are_facts():
    code = "    async def get(self, /, path, *rest, mode='r'):\n"
    code += "        return opened(self.find(path)).read(rest)"
    found = assistant.card({"code": code, "summary": "Read it."})
    assert found == {
        "name": "get",
        "arguments": ["self", "path", "mode"],
        "calls": ["opened", "find", "read"],
        "summary": "Read it.",
    }
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


def test_reading_ease_is_flesch():
    text = "The cat sat on the mat. It was a sunny day."  # 11 words, 2 sentences, 12 syllables
    assert assistant.reading_ease(text) == pytest.approx(206.835 - 1.015 * 5.5 - 84.6 * 12 / 11)
    assert (
        assistant.reading_ease("Internationalisation necessitates organisational sophistication")
        == -50
    )


def test_the_example_files_are_written_once(tmp_path):
    cfg = TaskData(cache_dir=str(tmp_path))
    path = assistant.shipped_file(cfg, "tasks", "train")
    before = path.stat().st_mtime_ns
    assert (
        assistant.shipped_file(cfg, "tasks", "train") == path and path.stat().st_mtime_ns == before
    )
    names = {p.name for p in path.parent.iterdir()}
    assert names == {f"{h}{k}.jsonl" for h in ("", "heldout_") for k in assistant.MAKERS}
    counts = assistant.write_all(tmp_path / "out")
    assert (tmp_path / "out" / "tasks.jsonl").read_bytes() == path.read_bytes()
    assert counts["heldout_preferences.jsonl"] > 100
