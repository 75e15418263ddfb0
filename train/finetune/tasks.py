"""Records of several tasks -> rows: a prompt, and an answer to generate or labels to predict; and
predictions -> metrics (by torchmetrics) and one number for an assistant as a whole.

A record gives a row to every task whose fields and label it has; a label that is absent or null is
missing, never zero.

A prediction is a line of `predictions.jsonl`: {task, type, prediction, label}, with `scores`
{class: probability} for a classification.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from configs.finetune_schema import TaskConfig
from eagle import scoring
from eagle.errors import EagleError
from records.chat import apply_template, render_instruction
from records.fields import Fields
from records.render import record_key
from records.rows import RowError, fields_of
from records.tokens import encode, leading_ids

CHANCE = {"auroc": 0.5, "pairwise_accuracy": 0.5}
FLOOR = 0.01  # the least that a task counts


@dataclass
class TaskRow:
    """A prompt of task number `task`. `sequences`: its token ids, one for each candidate of a
    ranking, else one, and with it the answer to generate, which `mask` marks; `labels`: what is to
    be predicted of each sequence; `unused`: fields of the record."""

    task: int
    key: int
    sequences: list[list[int]]
    labels: list[float]
    mask: list[int] | None = None
    answer: str | None = None
    unused: tuple[str, ...] = ()


def by_task(rows: list[TaskRow]) -> list[list[TaskRow]]:
    return [[row for row in rows if row.task == n] for n in sorted({row.task for row in rows})]


def count_labels(rows: list[TaskRow], tasks: list[TaskConfig], split: str) -> dict[str, int]:
    """Rows of each task; an error where a task has none."""
    counts = Counter(row.task for row in rows)
    if empty := [task for n, task in enumerate(tasks) if not counts[n]]:
        raise EagleError(
            f"no {split} record has a label for {', '.join(t.name for t in empty)}: add data with "
            f"{', '.join(t.label for t in empty)}, or take the task out of the registry"
        )
    return {task.name: counts[n] for n, task in enumerate(tasks)}


def render_record(record: dict, tasks: list, tokenizer: Any, max_length: int) -> list[TaskRow]:
    """A row for each task that takes the record."""
    key, rows, fields = record_key(record), [], Fields(record)
    fields.taken |= {name for task in tasks for name in (*task.fields, task.label)}
    for n, task in enumerate(tasks):
        if record.get(task.label) is None or any(record.get(f) is None for f in task.fields):
            continue
        if task.type == "generation":
            answer = record[task.label]
            if not isinstance(answer, str) or not answer.strip():
                raise wrong_label(task, answer, "text")
            asked = {"instruction": fill(task, record), "output": answer}
            row = render_instruction(asked, tokenizer, 10**9)
            rows.append(TaskRow(n, key, [row.input_ids], [], row.loss_mask, answer))
        else:
            variants = read_candidates(task, record) if task.type == "ranking" else [record]
            sequences = [encode_prompt(fill(task, variant), tokenizer) for variant in variants]
            labels = [read_label(task, variant[task.label]) for variant in variants]
            rows.append(TaskRow(n, key, sequences, labels))
    if not rows:
        remedy = f"give its fields and one label of: {', '.join(sorted({t.label for t in tasks}))}"
        raise RowError("no task takes this record", remedy, fields_of(record))
    if any(len(ids) > max_length for row in rows for ids in row.sequences):
        remedy = f"raise data.max_length={max_length}, or shorten it"
        raise RowError("longer than data.max_length", remedy)
    rows[0].unused = tuple(fields.left())
    return rows


def read_candidates(task: TaskConfig, record: dict) -> list[dict]:
    """The record once for each candidate of a ranking: one of its fields is a list of them, and the
    label a list with a number for each."""
    lists, scores = [f for f in task.fields if isinstance(record[f], list)], record[task.label]
    if len(lists) != 1:
        remedy = f"fields are {', '.join(task.fields)}"
        raise RowError(f"{task.name}: one field must be a list of candidates", remedy)
    if not isinstance(scores, list) or not all(_is_number(s) for s in scores):
        raise wrong_label(task, scores, "a list of numbers")
    candidates = record[lists[0]]
    if len(scores) != len(candidates) or len(set(scores)) < 2:
        remedy = "give each candidate a number, and not all the same"
        detail = f"{len(candidates)} candidates, labels {scores}"[:200]
        raise RowError(f"{task.name}: labels do not rank the candidates", remedy, detail)
    return [{**record, lists[0]: c, task.label: s} for c, s in zip(candidates, scores, strict=True)]


def read_label(task: TaskConfig, value: Any) -> float:
    """A class's number, or the number itself."""
    if task.type == "classification":
        name = str(value).lower() if isinstance(value, int) else value  # true, 1
        if name not in task.classes:
            raise wrong_label(task, value, f"one of {', '.join(task.classes)}")
        return float(task.classes.index(name))
    if not _is_number(value):
        raise wrong_label(task, value, "a finite number")
    return float(value)


def fill(task: TaskConfig, record: dict) -> str:
    """The template with the record's fields, which must be text or numbers."""
    given = {name: record[name] for name in task.fields}
    for name, value in given.items():
        if not (isinstance(value, str) and value.strip()) and not _is_number(value):
            detail, remedy = f"it is {type(value).__name__}", "give it text, or leave it out"
            raise RowError(f"{task.name}: field '{name}' is not text", remedy, detail)
    return task.template.format_map(given)


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids up to the last of the prompt's text, where a head reads: of what a chat template
    puts behind it, a small model makes a worse summary than of the text (docs/finetune.md)."""
    prompt = prompt.strip()
    if not getattr(tokenizer, "chat_template", None):
        return leading_ids(tokenizer) + encode(tokenizer, prompt)
    text = apply_template(tokenizer, [{"role": "user", "content": prompt}])
    place = text.rfind(prompt)
    if place < 0:
        raise RowError("the chat template rewrites the prompt", "use a simpler chat template")
    return encode(tokenizer, text[: place + len(prompt)])


def wrong_label(task: TaskConfig, value: Any, wanted: str) -> RowError:
    remedy = "repair the label, or leave it out: it is then missing"
    reason = f"{task.name}: label '{task.label}' is not {wanted}"
    return RowError(reason, remedy, f"it is {value!r}"[:120])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lines_of(task: TaskConfig, found: list[tuple[Any, Any]]) -> list[dict]:
    """(prediction, label) pairs as lines of `predictions.jsonl`; of a classification the prediction
    is the probabilities and the label a number."""
    lines = []
    for prediction, label in found:
        more = {}
        if task.classes:
            more["scores"] = scores = dict(zip(task.classes, prediction, strict=True))
            prediction, label = max(scores, key=scores.get), task.classes[int(label)]
        line = {"task": task.name, "type": task.type, "prediction": prediction, "label": label}
        lines.append(line | more)
    return lines


def measure_task(task: TaskConfig, lines: list[dict]) -> dict[str, float]:
    """All metrics of the task's type over its predictions; {} without any."""
    if not lines:
        return {}
    pairs = [(line["prediction"], line["label"]) for line in lines]
    predictions, labels = zip(*pairs, strict=True)
    if task.type == "classification":
        scores = [line["scores"] for line in lines]
        found = scoring.classification(predictions, labels, scores, task.classes)
        del found["labels"]
    elif task.type == "regression":
        found, middle = scoring.regression(pairs), median_low(labels)
        found["mae_of_median"] = sum(abs(label - middle) for label in labels) / len(labels)
    elif task.type == "ranking":
        found = scoring.ranking(pairs)
    else:
        exact = sum(p.strip() == a.strip() for p, a in pairs) / len(pairs)
        found = {"rouge_l": scoring.rouge_l(predictions, labels), "exact_match": exact}
    return {name: value for name, value in found.items() if value is not None}


def skill(task: TaskConfig, found: dict[str, float]) -> float | None:
    """The task's metric between 0, what is had without looking at the input, and 1, perfection;
    None where the metric could not be computed."""
    if (value := found.get(task.metric)) is None:
        return None
    if task.metric == "mae":
        constant = found["mae_of_median"]
        value = 1 - value / constant if constant > 0 else float(value == 0)
    by_class = 1 / len(task.classes) if task.metric in ("accuracy", "macro_f1") else 0.0
    floor = CHANCE.get(task.metric, by_class)
    return min(max((value - floor) / (1 - floor), 0.0), 1.0)


def reliability(tasks: list[TaskConfig], found: dict[str, dict[str, float]]) -> float | None:
    """The weighted geometric mean of the tasks' skills, which is our composite; None when a task has
    no value."""
    skills = [skill(task, found.get(task.name, {})) for task in tasks]
    if not skills or any(s is None for s in skills):
        return None
    logs = [t.weight * math.log(max(s, FLOOR)) for t, s in zip(tasks, skills, strict=True)]
    return math.exp(sum(logs) / sum(task.weight for task in tasks))
