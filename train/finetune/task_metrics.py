"""How good predictions are, by torchmetrics, and one number for an assistant as a whole.

A prediction is a line of `predictions.jsonl`: {task, type, prediction, label}, with `scores`
{class: probability} for a classification.
"""

from __future__ import annotations

import math
from statistics import median_low
from typing import Any

from configs.finetune_schema import TaskConfig
from eagle import scoring

FLOOR = 0.01


def measure_task(task: TaskConfig, lines: list[dict]) -> dict[str, float]:
    """All metrics of the task's type over its predictions; {} without any."""
    if not lines:
        return {}
    predictions, labels = ([line[key] for line in lines] for key in ("prediction", "label"))
    if task.type == "classification":
        scores = [line["scores"] for line in lines]
        found = scoring.classification(predictions, labels, scores, task.classes)
        del found["labels"]
    elif task.type == "regression":
        found = scoring.regression(list(zip(predictions, labels, strict=True)))
        middle = median_low(labels)
        found["mae_of_median"] = sum(abs(label - middle) for label in labels) / len(labels)
    elif task.type == "ranking":
        found = scoring.ranking(list(zip(predictions, labels, strict=True)))
    else:
        texts = [(p.strip(), a.strip()) for p, a in zip(predictions, labels, strict=True)]
        found = {"rouge_l": scoring.rouge_l(*zip(*texts, strict=True))}
        found["exact_match"] = sum(p == a for p, a in texts) / len(texts)
    return {name: value for name, value in found.items() if value is not None}


def skill(task: TaskConfig, found: dict[str, float]) -> float | None:
    """The task's metric between 0, what is had without looking at the input, and 1, perfection;
    None where the metric could not be computed."""
    value = found.get(task.metric)
    if value is None:
        return None
    if task.metric == "mae":
        constant = found["mae_of_median"]
        value = 1 - value / constant if constant > 0 else float(value == 0)
    by_class = 1 / len(task.classes or [1])
    chance = {"accuracy": by_class, "macro_f1": by_class, "auroc": 0.5, "pairwise_accuracy": 0.5}
    floor = chance.get(task.metric, 0.0)
    return min(max((value - floor) / (1 - floor), 0.0), 1.0)


def reliability(tasks: list[TaskConfig], found: dict[str, dict[str, float]]) -> float | None:
    """Our composite: the weighted geometric mean of the tasks' skills, none counting less than
    0.01 (docs/finetune.md). None when a task has no value."""
    skills = [skill(task, found.get(task.name, {})) for task in tasks]
    if not skills or any(s is None for s in skills):
        return None
    total = sum(task.weight for task in tasks)
    logs = [t.weight * math.log(max(s, FLOOR)) for t, s in zip(tasks, skills, strict=True)]
    return math.exp(sum(logs) / total)


def lines_of(task: TaskConfig, found: list[tuple[Any, Any]]) -> list[dict]:
    """(prediction, label) pairs as lines of `predictions.jsonl`; of a classification the prediction
    is the probabilities and the label a number."""
    lines = []
    for prediction, label in found:
        line = {"task": task.name, "type": task.type, "prediction": prediction, "label": label}
        if task.classes:
            scores = dict(zip(task.classes, prediction, strict=True))
            line["prediction"] = max(scores, key=scores.__getitem__)
            line |= {"label": task.classes[int(label)], "scores": scores}
        lines.append(line)
    return lines
