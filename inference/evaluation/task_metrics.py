"""Metrics of classification, regression, ranking and generation tasks, from predictions and labels.

They are torchmetrics' and sacrebleu's. Knows values; knows nothing of the model that predicted
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from eagle import scoring
from eagle.errors import EagleError

from .text_metrics import HINT, with_references

KINDS = ("classification", "regression", "ranking", "generation")


@dataclass(frozen=True)
class Answer:
    """prediction None: the model gave none that could be read. scores: {label: probability or any
    score}.
    """

    task: str
    kind: str
    prediction: object
    label: object
    scores: dict[str, float] | None = None


def read_answer(row: object) -> Answer:
    """{"task", "type", "prediction", "label", "scores"?}; raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("must be an object with task, type, prediction and label")
    if missing := [name for name in ("task", "type", "prediction", "label") if name not in row]:
        raise ValueError(f"has no {', '.join(missing)}")
    task, kind, prediction, label = (row[n] for n in ("task", "type", "prediction", "label"))
    if kind not in KINDS:
        raise ValueError(f"type must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "regression":
        for name, value in (("label", label), ("prediction", prediction)):
            if not is_number(value) and not (value is None and name == "prediction"):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
    elif kind == "ranking":
        for name, value in (("label", label), ("prediction", prediction)):
            numbers = isinstance(value, list) and all(map(is_number, value))
            if not numbers and not (value is None and name == "prediction"):
                raise ValueError(f"{name} must be a list of finite numbers, not {value!r}")
        if len(set(label)) < 2 or prediction is not None and len(prediction) != len(label):
            raise ValueError("label and prediction must be as long, and the labels not all alike")
    else:
        wanted = (str,) if kind == "generation" else (str, int)
        if not isinstance(label, wanted) or not isinstance(prediction, (*wanted, type(None))):
            raise ValueError(f"label and prediction of a {kind} must be text")
    scores = row.get("scores")
    if scores is not None and (
        kind != "classification"
        or not isinstance(scores, dict)
        or str(label) not in scores
        or not all(isinstance(v, Real) and math.isfinite(v) for v in scores.values())
    ):
        raise ValueError(
            "scores must be {label: number} of a classification, the right label included"
        )
    return Answer(str(task), kind, prediction, label, scores)


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def task_report(answers: Sequence[Answer]) -> dict:
    """{task: {"type", "rows", "unanswered", metrics…}}, and "mean_primary", the mean of accuracy,
    Spearman's correlation, pairwise accuracy or ROUGE-L over tasks (None where one is
    undefined)."""
    try:
        import torchmetrics.functional  # noqa: F401
    except ImportError as error:
        raise EagleError(HINT) from error
    tasks: dict[str, list[Answer]] = {}
    for answer in answers:
        tasks.setdefault(answer.task, []).append(answer)
    if not tasks:
        raise EagleError("there are no predictions; give a file with one JSON object a line")
    report = {}
    for task, rows in tasks.items():
        kinds = {row.kind for row in rows}
        if len(kinds) > 1:
            raise EagleError(
                f"task {task!r} has rows of types {' and '.join(sorted(kinds))}; give each its own name"
            )
        kind = rows[0].kind
        unanswered = sum(row.prediction is None for row in rows)
        report[task] = {
            "type": kind,
            "rows": len(rows),
            "unanswered": unanswered,
            **METRICS[kind](rows),
        }
    primary = [entry[PRIMARY[entry["type"]]] for entry in report.values()]
    mean = None if None in primary else sum(primary) / len(primary)
    return {"tasks": report, "mean_primary": mean}


def classification(rows: Sequence[Answer]) -> dict:
    """accuracy, macro_f1 and mcc over the labels, a prediction that is none of them, or missing,
    being wrong. auroc where every row has scores (probabilities, or logits when one is outside [0,
    1]): of two labels the second one's, in sorted order, else one against the rest, macro. None:
    undefined, as where all labels are equal."""
    import torch
    from torchmetrics.functional.classification import (
        binary_auroc,
        multiclass_accuracy,
        multiclass_auroc,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    labels = sorted({str(row.label) for row in rows})
    other = len(labels)  # one more class, which no label has
    index = {label: i for i, label in enumerate(labels)}
    target = torch.tensor([index[str(row.label)] for row in rows])
    found = torch.tensor([index.get(str(row.prediction), other) for row in rows])
    f1 = multiclass_f1_score(found, target, other + 1, average=None)[:other].mean()
    entry = {
        "labels": other,
        "accuracy": float(multiclass_accuracy(found, target, other + 1, average="micro")),
        "macro_f1": float(f1),
        "mcc": float(multiclass_matthews_corrcoef(found, target, other + 1)) if other > 1 else None,
        "auroc": None,
    }
    if other > 1 and all(row.scores is not None for row in rows):
        if missing := [label for label in labels if any(label not in row.scores for row in rows)]:
            raise EagleError(
                f"task {rows[0].task!r} has rows without a score for {missing[0]!r}; each needs one for every label"
            )
        scores = [[row.scores[label] for label in labels] for row in rows]
        scores = torch.tensor(scores, dtype=torch.float64)
        if scores.min() < 0 or scores.max() > 1:  # logits
            scores = scores.softmax(-1)
        entry["auroc"] = float(
            binary_auroc(scores[:, 1], target)
            if other == 2
            else multiclass_auroc(scores, target, other)
        )
    return entry


def regression(rows: Sequence[Answer]) -> dict:
    """mae, pearson and spearman over the answered rows; None: undefined, as a correlation of
    constants.
    """
    import torch
    from torchmetrics.functional import mean_absolute_error, pearson_corrcoef, spearman_corrcoef

    answered = [row for row in rows if row.prediction is not None]
    found = torch.tensor([float(row.prediction) for row in answered], dtype=torch.float64)
    target = torch.tensor([float(row.label) for row in answered], dtype=torch.float64)
    entry: dict = {"mae": None, "pearson": None, "spearman": None}
    if answered:
        entry["mae"] = float(mean_absolute_error(found, target))
    if len(answered) > 1 and len(set(found.tolist())) > 1 and len(set(target.tolist())) > 1:
        entry["pearson"] = float(pearson_corrcoef(found, target))
        entry["spearman"] = float(spearman_corrcoef(found, target))
    return entry


def ranking(rows: Sequence[Answer]) -> dict:
    """pairwise_accuracy and ndcg over the answered rows; None without any."""
    pairs = [(row.prediction, row.label) for row in rows if row.prediction is not None]
    return scoring.ranking(pairs) if pairs else {"pairwise_accuracy": None, "ndcg": None}


def generation(rows: Sequence[Answer]) -> dict:
    """rouge_l, chrf and exact_match; a missing text is an empty one."""
    return with_references([row.prediction or "" for row in rows], [row.label for row in rows])


METRICS = {
    "classification": classification,
    "regression": regression,
    "ranking": ranking,
    "generation": generation,
}
PRIMARY = {
    "classification": "accuracy",
    "regression": "spearman",
    "ranking": "pairwise_accuracy",
    "generation": "rouge_l",
}
