"""Acceptance length on held-out prompts, measured with the real engine."""

from __future__ import annotations

import time

import numpy as np

from configs.schema import EvalConfig
from eagle.head import Eagle3Head
from eagle.target import Target


def heldout_prompts(data, count: int, limit: int) -> list[list[int]]:
    """`count` rows spread over `data`: what precedes a row's first supervised token, at most `limit` tokens
    (the end is kept). Rows that are supervised from the start, as plain text, give their first half."""
    prompts = []
    for index in np.linspace(0, len(data) - 1, min(count, len(data))).astype(int):
        row = data[int(index)]
        ids, mask = list(row["input_ids"]), list(row["loss_mask"])
        first = mask.index(1)
        prompts.append(ids[: first if first > 1 else max(len(ids) // 2, 1)][-limit:])
    return prompts


def acceptance(
    target: Target, head: Eagle3Head, prompts: list[list[int]], cfg: EvalConfig, batch: int = 8
) -> dict:
    """Greedy decoding of every prompt -> tau (tokens a verification), acceptance by depth, counts, seconds."""
    from eagle.model import EaModel, acceptance_by_depth

    started = time.monotonic()
    model = EaModel(target, head=head, tree=cfg.tree)
    rows = []
    for start in range(0, len(prompts), batch):
        result = model.generate(
            prompts[start : start + batch], max_new_tokens=cfg.max_new_tokens, temperature=0.0
        )
        rows += result.rows
    cycles = sum(row.cycles for row in rows)
    gained = sum(len(row.tokens) - 1 for row in rows)
    return {
        "tau": gained / cycles if cycles else 0.0,
        "acceptance_by_depth": acceptance_by_depth([row.accepted for row in rows]),
        "prompts": len(prompts),
        "new_tokens": sum(len(row.tokens) for row in rows),
        "seconds": time.monotonic() - started,
    }
