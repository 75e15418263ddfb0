"""How near texts and rankings are to what was wanted; torchmetrics computes."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from .errors import EagleError

# a letter of scripts without spaces between words, else a word; marks go with their letter
SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"{SPACELESS}\p{{M}}*|(?:(?!{SPACELESS})\w)+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and marks, in any script; code comes out as its tokens."""
    return WORD.findall(text)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, cased, mean over texts: 0 … 1."""
    from torchmetrics.functional.text.rouge import rouge_score

    texts, how = (list(predictions), list(references)), {"normalizer": str, "tokenizer": words}
    return float(rouge_score(*texts, rouge_keys="rougeL", **how)["rougeL_fmeasure"])


def ranking(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """pairs: of each list its candidates' scores and their labels, not all alike.
    pairwise_accuracy: how often the candidate of the higher label has the higher score, a tie being
    half; and ndcg; means over the lists."""
    import torch
    from torchmetrics.functional.retrieval import retrieval_normalized_dcg

    right, ndcg = [], []
    for scores, labels in pairs:
        scores, labels = torch.tensor(scores), torch.tensor(labels).double()
        better = labels[:, None] > labels[None]
        wins = (scores[:, None] > scores[None]).double() + 0.5 * (scores[:, None] == scores[None])
        right.append(float(wins[better].mean()))
        ndcg.append(float(retrieval_normalized_dcg(scores, labels - labels.min())))
    return {"pairwise_accuracy": sum(right) / len(right), "ndcg": sum(ndcg) / len(ndcg)}


def classification(
    predictions: Sequence[str | None],
    labels: Sequence[str],
    scores: Sequence[dict[str, float]] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """accuracy, macro_f1 and mcc over the classes (by default the labels that occur), a prediction
    that is none of them, or None, being wrong. auroc from scores of every class (probabilities, or
    logits when one is outside [0, 1]), where every class is some row's label: of two the second
    one's, else one against the rest, macro. None: undefined, as where all labels are equal."""
    import torch
    from torchmetrics.functional import classification as metrics

    classes = list(classes or sorted(set(labels)))
    count = len(classes)  # and one more class, which no label has
    index = {name: i for i, name in enumerate(classes)}
    target = torch.tensor([index[label] for label in labels])
    found = torch.tensor([index.get(p, count) for p in predictions])
    f1 = metrics.multiclass_f1_score(found, target, count + 1, average=None)
    occur = torch.cat([found, target]).unique()
    result = {
        "labels": count,
        "accuracy": float((found == target).float().mean()),
        "macro_f1": float(f1[occur[occur < count]].mean()),
        "mcc": None,
        "auroc": None,
    }
    if count > 1:
        result["mcc"] = float(metrics.multiclass_matthews_corrcoef(found, target, count + 1))
    if scores is not None and count > 1 and len(target.unique()) == count:
        if missing := [name for name in classes if any(name not in row for row in scores)]:
            raise EagleError(f"rows without a score for {missing[0]!r}; each needs one for all")
        lines = [[row[name] for name in classes] for row in scores]
        table = torch.tensor(lines, dtype=torch.float64)
        if table.min() < 0 or table.max() > 1:  # logits
            table = table.softmax(-1)
        two = count == 2
        auroc = metrics.binary_auroc if two else metrics.multiclass_auroc
        result["auroc"] = float(auroc(table[:, 1], target) if two else auroc(table, target, count))
    return result


def regression(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """pairs: (prediction, label). mae, pearson and spearman; None: undefined, as a correlation of
    constants."""
    import torch
    from torchmetrics.functional import mean_absolute_error, pearson_corrcoef, spearman_corrcoef

    result: dict[str, float | None] = {"mae": None, "pearson": None, "spearman": None}
    if pairs:
        found, target = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        result["mae"] = float(mean_absolute_error(found, target))
        if len(found.unique()) > 1 and len(target.unique()) > 1:
            result["pearson"] = float(pearson_corrcoef(found, target))
            result["spearman"] = float(spearman_corrcoef(found, target))
    return result
