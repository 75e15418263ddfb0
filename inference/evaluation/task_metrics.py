"""Metrics of classification, regression, ranking and generation tasks, from predictions and
labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

from eagle import scoring
from eagle.errors import EagleError

from .text_metrics import HINT, with_references


class Line(BaseModel):
    """prediction None: the model gave none that could be read."""

    model_config = ConfigDict(strict=True)
    task: str


class Classification(Line):
    type: Literal["classification"]
    label: str | int
    prediction: str | int | None
    scores: dict[str, FiniteFloat] | None = None  # probabilities or logits

    @model_validator(mode="after")
    def scored(self):
        if self.scores is not None and str(self.label) not in self.scores:
            raise ValueError("scores must be {label: number}, the right label included")
        return self


class Regression(Line):
    type: Literal["regression"]
    label: FiniteFloat
    prediction: FiniteFloat | None


class Ranking(Line):
    type: Literal["ranking"]
    label: list[FiniteFloat]
    prediction: list[FiniteFloat] | None

    @model_validator(mode="after")
    def comparable(self):
        candidates = len(self.label if self.prediction is None else self.prediction)
        if len(set(self.label)) < 2 or candidates != len(self.label):
            raise ValueError("label and prediction must be as long, and the labels not all alike")
        return self


class Generation(Line):
    type: Literal["generation"]
    label: str
    prediction: str | None


Answer = Classification | Regression | Ranking | Generation
READER = TypeAdapter(Annotated[Answer, Field(discriminator="type")])


def read_answer(row: dict, place: int = 0) -> Answer:
    """{"task", "type", "prediction", "label", "scores"?}; raises ValueError with what is wrong."""
    return READER.validate_python(row)


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
    report = {}
    for task, rows in tasks.items():
        kinds = sorted({row.type for row in rows})
        if len(kinds) > 1:
            raise EagleError(
                f"task {task!r} has rows of types {' and '.join(kinds)}; give each its own name"
            )
        answered = [row for row in rows if row.prediction is not None]
        counts = {"type": kinds[0], "rows": len(rows), "unanswered": len(rows) - len(answered)}
        report[task] = counts | measure(kinds[0], rows, answered)
    primary = [entry[PRIMARY[entry["type"]]] for entry in report.values()]
    mean = None if None in primary else sum(primary) / len(primary)
    return {"tasks": report, "mean_primary": mean}


def measure(kind: str, rows: Sequence[Answer], answered: Sequence[Answer]) -> dict:
    """A missing answer is a wrong class and an empty text; numbers are measured where there are
    any."""
    if kind == "classification":
        scores = [row.scores for row in rows]
        found = [None if row.prediction is None else str(row.prediction) for row in rows]
        labels = [str(row.label) for row in rows]
        return scoring.classification(found, labels, None if None in scores else scores)
    if kind == "generation":
        return with_references([row.prediction or "" for row in rows], [row.label for row in rows])
    pairs = [(row.prediction, row.label) for row in answered]
    if kind == "regression":
        return scoring.regression(pairs)
    return scoring.ranking(pairs) if pairs else {"pairwise_accuracy": None, "ndcg": None}


PRIMARY = {
    "classification": "accuracy",
    "regression": "spearman",
    "ranking": "pairwise_accuracy",
    "generation": "rouge_l",
}
