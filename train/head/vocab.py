"""The draft vocabulary: which target tokens the head can propose."""

from __future__ import annotations

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

    `always` comes first, then the most frequent, then the lowest unused ids; ties go to the lower id.
    """
    chosen = list(dict.fromkeys(always))[:size]
    taken = np.zeros(len(counts), dtype=bool)
    taken[chosen] = True
    ranked = np.argsort(-counts, kind="stable")  # unseen ones come last, lowest id first
    chosen += [int(i) for i in ranked if not taken[i]][: size - len(chosen)]
    ids = np.sort(np.asarray(chosen, dtype=np.int64))
    report = coverage(counts, ids)
    report["special_tokens"] = len(set(always) & set(chosen))
    return torch.from_numpy(ids), report


def coverage(counts: np.ndarray, ids: np.ndarray) -> dict:
    """How much of the supervised tokens the draft vocabulary can express."""
    total = int(counts.sum())
    return {
        "draft_vocab_size": len(ids),
        "vocab_size": len(counts),
        "distinct_supervised": int((counts > 0).sum()),
        "coverage": float(counts[ids].sum() / total) if total else 0.0,
    }
