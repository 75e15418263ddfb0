"""Records of several tasks -> rows: a prompt, and an answer to generate or labels to predict.

A record belongs to every task whose fields and label it has; a label that is absent or null is
missing, never zero. Tasks that predict (classification, regression, ranking) from the same template
share a row, with one label each; a generation task has rows of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from configs.finetune_schema import TaskConfig
from eagle.errors import EagleError
from records.chat import render_chat
from records.render import record_key
from records.rows import RowError
from records.tokens import encode, encode_with_spans, leading_ids


@dataclass
class TaskRow:
    """One prompt. `sequences`: its token ids, one for each candidate of a ranking, else one.
    `targets` [tasks] of each sequence: NaN where a label is missing. A generation row has `task`
    and `mask`, no targets. Rows of one `kind` are of the same tasks."""

    kind: str
    key: int
    sequences: list[list[int]]
    targets: list[list[float]]
    task: int = -1
    mask: list[int] | None = None
    answer: str | None = None

    def labelled(self, tasks: list[TaskConfig]) -> list[str]:
        """Names of the tasks for which the row has a label."""
        if self.task >= 0:
            return [tasks[self.task].name]
        return [t.name for t, x in zip(tasks, self.targets[0], strict=True) if not math.isnan(x)]


def by_kind(rows: list[TaskRow]) -> list[list[TaskRow]]:
    kinds: dict[str, list[TaskRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return [kinds[kind] for kind in sorted(kinds)]


def count_labels(rows: list[TaskRow], tasks: list[TaskConfig], split: str) -> dict[str, int]:
    """Labels of each task; an error where a task has none."""
    counts = Counter(name for row in rows for name in row.labelled(tasks))
    if empty := [task for task in tasks if not counts[task.name]]:
        raise EagleError(
            f"no {split} record has a label for {', '.join(t.name for t in empty)}: add data with "
            f"{', '.join(t.label for t in empty)}, or take the task out of the registry"
        )
    return {task.name: counts[task.name] for task in tasks}


def render_record(
    record: dict, tasks: list[TaskConfig], tokenizer: Any, max_length: int
) -> list[TaskRow]:
    """A row for each prompt that the record gives."""
    key, rows = record_key(record), []
    shared: dict[tuple[str, str], list[int]] = {}
    for n, task in enumerate(tasks):
        if record.get(task.label) is None or any(record.get(f) is None for f in task.fields):
            continue
        if task.type == "generation":
            ids, mask = encode_answer(record, task, tokenizer)
            rows.append(TaskRow(task.name, key, [ids], [], n, mask, record[task.label]))
        else:  # candidates of a ranking and single texts never share a row
            group = (task.template, task.label if task.type == "ranking" else "")
            shared.setdefault(group, []).append(n)
    for numbers in shared.values():
        task = tasks[numbers[0]]
        variants = read_candidates(task, record) if task.type == "ranking" else [record]
        sequences = [encode_prompt(fill(task, variant), tokenizer) for variant in variants]
        targets = [[math.nan] * len(tasks) for _ in variants]
        for row, variant in zip(targets, variants, strict=True):
            for n in numbers:
                row[n] = read_label(tasks[n], variant[tasks[n].label])
        rows.append(TaskRow("+".join(tasks[n].name for n in numbers), key, sequences, targets))
    if not rows:
        known = ", ".join(sorted({t.label for t in tasks}))
        remedy = f"give its fields and one label of: {known}"
        fields = f"fields: {', '.join(map(str, record)) or 'none'}"
        raise RowError("no task takes this record", remedy, fields)
    if any(len(ids) > max_length for row in rows for ids in row.sequences):
        remedy = f"raise data.max_length={max_length}, or shorten it"
        raise RowError("longer than data.max_length", remedy)
    return rows


def encode_answer(record: dict, task: TaskConfig, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the prompt and the answer, and the mask of the answer."""
    answer, prompt = record[task.label], fill(task, record)
    if not isinstance(answer, str) or not answer.strip():
        raise wrong_label(task, answer, "text")
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        row = render_chat({"messages": turns}, tokenizer, 10**9)
        return row.input_ids, row.loss_mask
    ids, spans = encode_with_spans(tokenizer, f"{prompt}\n{answer}")
    mask = [int(start > len(prompt)) for start, _ in spans]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = leading_ids(tokenizer)
    return first + ids + end, [0] * len(first) + mask + [1] * len(end)


def read_candidates(task: TaskConfig, record: dict) -> list[dict]:
    """The record once for each candidate of a ranking: one of its fields is a list of them, and the
    label a list with a number for each."""
    lists, scores = [f for f in task.fields if isinstance(record[f], list)], record[task.label]
    if len(lists) != 1:
        raise RowError(
            f"{task.name}: one field must be a list of candidates",
            f"fields are {', '.join(task.fields)}",
            f"{len(lists)} are lists",
        )
    if not isinstance(scores, list) or not all(_is_number(s) for s in scores):
        raise wrong_label(task, scores, "a list of numbers")
    candidates = record[lists[0]]
    if len(scores) != len(candidates) or len(set(scores)) < 2:
        raise RowError(
            f"{task.name}: labels do not rank the candidates",
            "give each candidate a number, and not all the same",
            f"{len(candidates)} candidates, labels {scores}"[:200],
        )
    pairs = zip(candidates, scores, strict=True)
    return [{**record, lists[0]: candidate, task.label: score} for candidate, score in pairs]


def read_label(task: TaskConfig, value: Any) -> float:
    """A class's number, or the number itself."""
    if task.type == "classification":
        name = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
        name = str(name) if isinstance(name, int) else name
        if name not in task.classes:
            raise wrong_label(task, value, f"one of {', '.join(task.classes)}")
        return float(task.classes.index(name))
    if not _is_number(value):
        raise wrong_label(task, value, "a finite number")
    return float(value)


def fill(task: TaskConfig, record: dict) -> str:
    """The template with the record's fields, which must be text or numbers."""
    for name in task.fields:
        value = record[name]
        if not (isinstance(value, str) and value.strip()) and not _is_number(value):
            detail = f"it is {type(value).__name__}"
            remedy = "give it text, or leave it out"
            raise RowError(f"{task.name}: field '{name}' is not text", remedy, detail)
    return task.template.format_map({name: record[name] for name in task.fields})


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids up to the last of the prompt's text, where a head reads: of what a chat template
    puts behind it, a small model makes a worse summary than of the text (docs/finetune.md)."""
    prompt = prompt.strip()
    if not getattr(tokenizer, "chat_template", None):
        return leading_ids(tokenizer) + encode(tokenizer, prompt)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
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
