"""Metrics of tasks, from predictions and labels, and of texts: how near they are to their
references, how much they repeat themselves, and how a model likes them. torchmetrics and sacrebleu
compute.

T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    model_validator,
)

from eagle import scoring
from eagle.errors import EagleError

NGRAMS = (1, 2, 3, 4)


class Text(BaseModel):
    prediction: str = Field(validation_alias=AliasChoices("prediction", "completion"))
    reference: str | None = None
    context: str | None = None


Label = TypeVar("Label")


class Line(BaseModel, Generic[Label]):
    """prediction None: the model gave none that could be read."""

    model_config = ConfigDict(strict=True)
    task: str
    label: Label
    prediction: Label | None


class Classification(Line[str | int]):
    type: Literal["classification"]
    scores: dict[str, FiniteFloat] | None = None  # probabilities or logits

    @model_validator(mode="after")
    def scored(self):
        if self.scores is not None and str(self.label) not in self.scores:
            raise ValueError("scores must be {label: number}, the right label included")
        return self


class Regression(Line[FiniteFloat]):
    type: Literal["regression"]


class Ranking(Line[list[FiniteFloat]]):
    type: Literal["ranking"]

    @model_validator(mode="after")
    def comparable(self):
        candidates = len(self.label if self.prediction is None else self.prediction)
        if len(set(self.label)) < 2 or candidates != len(self.label):
            raise ValueError("label and prediction must be as long, and the labels not all alike")
        return self


class Generation(Line[str]):
    type: Literal["generation"]


Answer = Classification | Regression | Ranking | Generation
ANSWER = TypeAdapter(Annotated[Answer, Field(discriminator="type")])
PRIMARY = {
    "classification": "accuracy",
    "regression": "spearman",
    "ranking": "pairwise_accuracy",
    "generation": "rouge_l",
}


def require_libraries() -> None:
    try:
        import sacrebleu.metrics  # noqa: F401
        import torchmetrics.functional  # noqa: F401
    except ImportError as error:
        raise EagleError(
            "these metrics need torchmetrics and sacrebleu: pip install 'eagle-heads[eval]'"
        ) from error


def task_report(answers: Sequence[Answer]) -> dict:
    """{task: {"type", "rows", "unanswered", metrics…}}, and "mean_primary", the mean of accuracy,
    Spearman's correlation, pairwise accuracy or ROUGE-L over tasks (None where one is
    undefined)."""
    require_libraries()
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
        missing = sum(row.prediction is None for row in rows)
        counts = {"type": kinds[0], "rows": len(rows), "unanswered": missing}
        report[task] = counts | measure(kinds[0], rows)
    primary = [entry[PRIMARY[entry["type"]]] for entry in report.values()]
    mean = None if None in primary else sum(primary) / len(primary)
    return {"tasks": report, "mean_primary": mean}


def measure(kind: str, rows: Sequence[Answer]) -> dict:
    """A missing answer is a wrong class and an empty text; of numbers it does not count."""
    if kind == "classification":
        scores = [row.scores for row in rows]
        found = [None if row.prediction is None else str(row.prediction) for row in rows]
        labels = [str(row.label) for row in rows]
        return scoring.classification(found, labels, None if None in scores else scores)
    if kind == "generation":
        return with_references([row.prediction or "" for row in rows], [row.label for row in rows])
    pairs = [(row.prediction, row.label) for row in rows if row.prediction is not None]
    if kind == "regression":
        return scoring.regression(pairs)
    return scoring.ranking(pairs) if pairs else {"pairwise_accuracy": None, "ndcg": None}


def with_references(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """rouge_l (F1, mean over texts, cased), chrf (chrF++ of the corpus: letters up to 6, words up
    to 2), and exact_match (spaces at the ends aside); all in [0, 1]."""
    require_libraries()
    from sacrebleu.metrics import CHRF

    same = [a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)]
    return {
        "rouge_l": scoring.rouge_l(predictions, references),
        "chrf": CHRF(word_order=2).corpus_score(list(predictions), [list(references)]).score / 100,
        "exact_match": sum(same) / len(same),
    }


def repetition(texts: Sequence[str]) -> dict[str, float | None]:
    """By n: the share of a text's word n-grams that it had before, mean over texts that have any
    (seq-rep-n of Welleck et al., 2020); None where no text has."""
    found: dict[str, float | None] = {}
    for n in NGRAMS:
        tokens = [scoring.words(text) for text in texts]
        grams = [list(zip(*(row[i:] for i in range(n)), strict=False)) for row in tokens]
        shares = [1 - len(set(row)) / len(row) for row in grams if row]
        found[str(n)] = sum(shares) / len(shares) if shares else None
    return found


def perplexity(model, texts: Sequence[str], contexts: Sequence[str]) -> dict:
    """The stock model's exp of the mean negative log-likelihood a token, over all texts, each after
    its context. skipped: texts that do not fit the model, or have no token to predict."""
    import torch

    target, total = model.target, 0.0
    tokens = skipped = 0
    with torch.inference_mode(), target.stock() as stock:
        for context, text in zip(contexts, texts, strict=True):
            given = model.tokenizer(context, verbose=False).input_ids if context else []
            ids = model.tokenizer(text, verbose=False, add_special_tokens=not given).input_ids
            first = max(len(given), 1)  # a text without context is scored from its second token on
            both = given + ids
            if len(both) <= first or len(both) > target.max_positions:
                skipped += 1
                continue
            row = torch.tensor(both, device=target.device)
            logits = stock(row[None], use_cache=False).logits[0, first - 1 : -1].float()  # [T, V]
            total += torch.nn.functional.cross_entropy(logits, row[first:], reduction="sum").item()
            tokens += len(both) - first
    value = math.exp(total / tokens) if tokens else None
    return {"perplexity": value, "tokens": tokens, "skipped": skipped}
