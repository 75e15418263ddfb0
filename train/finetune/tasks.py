"""Records of several tasks -> rows: a prompt, and an answer to generate or labels to predict.

A record belongs to every task whose fields and label it has; a label that is absent or null is
missing, never zero. Tasks that predict (classification, regression, ranking) from the same template
share a row, with one label each; a generation task has rows of its own.

Knows tokenizers and the registry; knows nothing of models or batches.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.finetune_schema import TaskConfig, TaskData
from eagle.errors import EagleError
from records.chat import render_chat
from records.quarantine import each_record
from records.render import record_key
from records.rows import RowError
from records.tokens import encode, encode_with_spans, leading_ids, require_fast

MISSING = math.nan


@dataclass
class TaskRow:
    """One prompt. `sequences`: its token ids, one for each candidate of a ranking, else one.
    `targets` [tasks]
    of each sequence: NaN where a label is missing. A generation row has `task` and `mask`, no
      targets."""

    sequences: list[list[int]]
    targets: list[list[float]]
    task: int = -1
    mask: list[int] | None = None
    prompt_length: int = 0
    answer: str | None = None
    key: int = 0


class TaskRows:
    """Rows of one kind (a generation task, or the tasks that share a template), for a mixture."""

    def __init__(self, name: str, rows: list[TaskRow]) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TaskRow:
        return self.rows[index]


def load_tasks(
    cfg: TaskData, tasks: list[TaskConfig], tokenizer: Any, files: list[Path], out: Path | None
) -> tuple[list[TaskRows], dict]:
    """The rows of `files` by kind, and what was counted. Bad records go to `out` and above
    `data.max_bad_fraction` end the run."""
    require_fast(tokenizer)
    kinds: dict[str, list[TaskRow]] = {}
    labels: Counter = Counter()

    def take(record: dict) -> None:
        for kind, row in render_record(record, tasks, tokenizer, cfg.max_length):
            row.key = record_key(record)
            kinds.setdefault(kind, []).append(row)
            labels.update(labelled(row, tasks))

    card = each_record(files, cfg, out, take)
    card |= {
        "rows": sum(map(len, kinds.values())),
        "labels": {task.name: labels[task.name] for task in tasks},
    }
    return [TaskRows(kind, rows) for kind, rows in sorted(kinds.items())], card


def labelled(row: TaskRow, tasks: list[TaskConfig]) -> set[str]:
    """Names of the tasks for which a row has a label."""
    if row.task >= 0:
        return {tasks[row.task].name}
    return {t.name for n, t in enumerate(tasks) if not math.isnan(row.targets[0][n])}


def render_record(
    record: dict, tasks: list[TaskConfig], tokenizer: Any, max_length: int
) -> list[tuple[str, TaskRow]]:
    """(kind, row) for each prompt that the record gives."""
    shared: dict[tuple[str, str], list[int]] = {}
    out = []
    for n, task in enumerate(tasks):
        if record.get(task.label) is None or any(record.get(f) is None for f in task.fields):
            continue
        if task.type == "generation":
            out.append((task.name, render_generation(record, n, task, tokenizer, max_length)))
        else:  # candidates of a ranking and single texts never share a row
            group = (task.template, task.label if task.type == "ranking" else "")
            shared.setdefault(group, []).append(n)
    for numbers in shared.values():
        kind = "+".join(tasks[n].name for n in numbers)
        out.append((kind, render_prediction(record, numbers, tasks, tokenizer, max_length)))
    if not out:
        known = ", ".join(sorted({t.label for t in tasks}))
        raise RowError(
            "no task takes this record",
            f"give its fields and one label of: {known}",
            f"fields: {', '.join(map(str, record)) or 'none'}",
        )
    return out


def render_generation(
    record: dict, number: int, task: TaskConfig, tokenizer: Any, max_length: int
) -> TaskRow:
    answer = record[task.label]
    if not isinstance(answer, str) or not answer.strip():
        raise wrong_label(task, answer, "text")
    prompt = fill(task, record)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if getattr(tokenizer, "chat_template", None):
        row = render_chat({"messages": messages}, tokenizer, max_length)
        if row.truncated:
            raise too_long(max_length)
        ids, mask = row.input_ids, row.loss_mask
    else:
        text = f"{prompt}\n{answer}"
        ids, spans = encode_with_spans(tokenizer, text)
        mask = [int(start > len(prompt)) for start, _ in spans]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        first = leading_ids(tokenizer)
        ids, mask = first + ids + end, [0] * len(first) + mask + [1] * len(end)
        if len(ids) > max_length:
            raise too_long(max_length)
    return TaskRow([ids], [], number, mask, mask.index(1), answer)


def render_prediction(
    record: dict, numbers: list[int], tasks: list[TaskConfig], tokenizer: Any, max_length: int
) -> TaskRow:
    task = tasks[numbers[0]]
    if task.type == "ranking":
        return render_ranking(record, numbers[0], tasks, tokenizer, max_length)
    targets = [MISSING] * len(tasks)
    for n in numbers:
        targets[n] = read_label(tasks[n], record[tasks[n].label])
    ids = encode_prompt(fill(task, record), tokenizer, max_length)
    return TaskRow([ids], [targets])


def render_ranking(
    record: dict, number: int, tasks: list[TaskConfig], tokenizer: Any, max_length: int
) -> TaskRow:
    """One field of a ranking is the list of candidates; the label is a list with a number for
    each.
    """
    task, scores = tasks[number], record[tasks[number].label]
    lists = [f for f in task.fields if isinstance(record[f], list)]
    if len(lists) != 1:
        raise RowError(
            f"{task.name}: one field must be a list of candidates",
            f"fields are {', '.join(task.fields)}",
            f"{len(lists)} are lists",
        )
    candidates = record[lists[0]]
    if not isinstance(scores, list) or not all(_is_number(s) for s in scores):
        raise wrong_label(task, scores, "a list of numbers")
    if len(scores) != len(candidates) or len(set(scores)) < 2:
        raise RowError(
            f"{task.name}: labels do not rank the candidates",
            "give each candidate a number, and not all the same",
            f"{len(candidates)} candidates, labels {scores}"[:200],
        )
    sequences, targets = [], []
    for candidate, score in zip(candidates, scores, strict=True):
        text = fill(task, {**record, lists[0]: candidate})
        sequences.append(encode_prompt(text, tokenizer, max_length))
        targets.append([float(score) if n == number else MISSING for n in range(len(tasks))])
    return TaskRow(sequences, targets)


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
    values = {name: record[name] for name in task.fields}
    for name, value in values.items():
        if not (isinstance(value, str) and value.strip()) and not _is_number(value):
            raise RowError(
                f"{task.name}: field '{name}' is not text",
                "give it text, or leave it out",
                f"it is {type(value).__name__}",
            )
    return task.template.format_map(values)


def encode_prompt(prompt: str, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids up to the last of the prompt's text, where a head reads: of what a chat template
    puts behind it, a small model makes a worse summary than of the text (docs/finetune.md)."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        place = text.rfind(prompt.strip())
        if place < 0:
            raise RowError("the chat template rewrites the prompt", "use a simpler chat template")
        ids = encode(tokenizer, text[: place + len(prompt.strip())])
    else:
        ids = leading_ids(tokenizer) + encode(tokenizer, prompt.strip())
    if len(ids) > max_length:
        raise too_long(max_length)
    return ids


def split_heldout(kinds: list[TaskRows], heldout: Any) -> tuple[list[TaskRows], list[TaskRows]]:
    """`heldout(keys) -> [bool]` decides by record, so that all rows of a record are on one side."""
    keys = sorted({row.key for kind in kinds for row in kind.rows})
    held = {key for key, out in zip(keys, heldout(keys), strict=True) if out}
    parts = [[], []]
    for kind in kinds:
        for side in (0, 1):
            rows = [row for row in kind.rows if (row.key in held) == bool(side)]
            if rows:
                parts[side].append(TaskRows(kind.name, rows))
    return parts[0], parts[1]


def require_labels(tasks: list[TaskConfig], card: dict, split: str) -> None:
    empty = [name for name, count in card["labels"].items() if not count]
    if empty:
        raise EagleError(
            f"no {split} record has a label for {', '.join(empty)}: add data with "
            f"{', '.join(t.label for t in tasks if t.name in empty)}, or take the task out of the registry"
        )


def wrong_label(task: TaskConfig, value: Any, wanted: str) -> RowError:
    return RowError(
        f"{task.name}: label '{task.label}' is not {wanted}",
        "repair the label, or leave it out: it is then missing",
        f"it is {value!r}"[:120],
    )


def too_long(max_length: int) -> RowError:
    return RowError(
        "longer than data.max_length", f"raise data.max_length={max_length}, or shorten it"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
