"""The draft vocabulary: which target tokens the head can propose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def special_ids(tokenizer, vocab_size: int) -> list[int]:
    """End, FIM, chat and other added tokens that lie in the model's vocabulary."""
    ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return sorted(i for i in ids if 0 <= i < vocab_size)


def choose_draft_vocab(
    counts: np.ndarray, always: list[int], size: int
) -> tuple[torch.Tensor, dict]:
    """counts [V]: how often a token is supervised -> ids [size] int64 sorted, and a report.

    `always` comes first, then the most frequent, then the lowest unused ids; ties go to the lower
    id.
    """
    chosen = list(dict.fromkeys(always))[:size]
    taken = np.zeros(len(counts), dtype=bool)
    taken[chosen] = True
    ranked = np.argsort(-counts, kind="stable")  # unseen ones come last, lowest id first
    chosen += [int(i) for i in ranked if not taken[i]][: size - len(chosen)]
    ids = np.sort(np.asarray(chosen, dtype=np.int64))
    return torch.from_numpy(ids), coverage(counts, ids, always)


def coverage(
    counts: np.ndarray, ids: np.ndarray, always: Sequence[int] = (), sources: dict | None = None
) -> dict:
    """How much of the supervised tokens the draft vocabulary can express. always: the special
    tokens.
    sources: [V] counts of each source, by name."""
    report = {
        "draft_vocab_size": len(ids),
        "vocab_size": len(counts),
        "distinct_supervised": int((counts > 0).sum()),
        "coverage": _share(counts, ids),
        "special_tokens": len(set(always) & set(ids.tolist())),
    }
    if sources:
        report["coverage_by_source"] = {n: _share(each, ids) for n, each in sources.items()}
    return report


def describe(report: dict) -> str:
    """`coverage()` in one line."""
    by_source = report.get("coverage_by_source", {})
    parts = [f"{name} {share:.2%}" for name, share in by_source.items()]
    return (
        f"draft vocabulary: {report['draft_vocab_size']} of {report['vocab_size']} tokens hold "
        f"{report['coverage']:.2%} of what is supervised"
        + (f" ({', '.join(parts)})" if parts else "")
    )


def _share(counts: np.ndarray, ids: np.ndarray) -> float:
    total = int(counts.sum())
    return float(counts[ids].sum() / total) if total else 0.0
