"""How near texts and rankings are to what was wanted; torchmetrics computes."""

from __future__ import annotations

from collections.abc import Sequence

import regex

# of scripts that put no spaces between words each letter counts, of others each word; marks go with
# their letter
SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"{SPACELESS}\p{{M}}*|(?:(?!{SPACELESS})\w)+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and marks, in any script; code comes out as its tokens."""
    return WORD.findall(text)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, cased, mean over texts: 0 … 1."""
    from torchmetrics.functional.text.rouge import rouge_score

    found = rouge_score(
        list(predictions), list(references), rouge_keys="rougeL", normalizer=str, tokenizer=words
    )
    return float(found["rougeL_fmeasure"])


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
