"""How near texts are to their references, how much they repeat themselves, and how a model likes
them. ROUGE-L and perplexity are torchmetrics', chrF is sacrebleu's.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import AliasChoices, BaseModel, Field

from eagle.errors import EagleError
from eagle.scoring import rouge_l, words

HINT = "these metrics need torchmetrics and sacrebleu: pip install 'eagle-heads[eval]'"
NGRAMS = (1, 2, 3, 4)


class Text(BaseModel):
    prediction: str = Field(validation_alias=AliasChoices("prediction", "completion"))
    reference: str | None = None
    context: str | None = None


def read_text(row: dict, place: int) -> Text:
    return Text.model_validate(row)


def with_references(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """rouge_l (F1, mean over texts, cased), chrf (chrF++ of the corpus: letters up to 6, words up
    to 2), and exact_match (spaces at the ends aside); all in [0, 1]."""
    try:
        import torchmetrics  # noqa: F401
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise EagleError(HINT) from error
    same = [a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)]
    return {
        "rouge_l": rouge_l(predictions, references),
        "chrf": CHRF(word_order=2).corpus_score(list(predictions), [list(references)]).score / 100,
        "exact_match": sum(same) / len(same),
    }


def repetition(texts: Sequence[str]) -> dict[str, float | None]:
    """By n: the share of a text's word n-grams that it had before, mean over texts that have any
    (seq-rep-n of Welleck et al., 2020); None where no text has."""
    found: dict[str, float | None] = {}
    for n in NGRAMS:
        shares = []
        for text in texts:
            tokens = words(text)
            grams = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
            if total := sum(grams.values()):
                shares.append(1 - len(grams) / total)
        found[str(n)] = sum(shares) / len(shares) if shares else None
    return found


def perplexity(model, texts: Sequence[str], contexts: Sequence[str]) -> dict:
    """exp of the mean negative log-likelihood a token, over all texts, each after its context: the
    stock model's.

    A text that does not fit the model, or has no token to predict, is counted in `skipped` and not
    scored."""
    try:
        from torchmetrics.text import Perplexity
    except ImportError as error:
        raise EagleError(HINT) from error
    import torch

    target = model.target
    metric = Perplexity().to(target.device)
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
            row = torch.tensor([both], device=target.device)
            logits = stock(row, use_cache=False).logits[:, first - 1 : -1].float()  # [1, T, V]
            metric.update(logits, row[:, first:])
            tokens += len(both) - first
    value = float(metric.compute()) if tokens else None
    return {"perplexity": value, "tokens": tokens, "skipped": skipped}
