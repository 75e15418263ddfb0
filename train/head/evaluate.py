"""Acceptance length on held-out prompts, measured with the real engine."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from configs.schema import EvalConfig
from eagle.heads.head import DraftHead
from eagle.model import EaModel, acceptance_by_depth
from eagle.target import Target
from records import TokenizedData
from train.head.distributed import World

Prompt = tuple[str, list[int]]  # name of its source, token ids
BATCH = 8  # prompts decoded together


def heldout_prompts(data: TokenizedData, count: int, limit: int) -> list[Prompt]:
    """`count` rows, as many of each source, spread over it: what precedes a row's first supervised
    token, its last `limit` tokens. Rows supervised from the start, as plain text, give their first
    half."""
    sources, prompts = data.sources, []
    for n, source in enumerate(sources):
        share = (count + len(sources) - 1 - n) // len(sources)
        for index in np.linspace(0, len(source) - 1, min(share, len(source))).astype(int):
            row = source[int(index)]
            ids, mask = list(row["input_ids"]), list(row["loss_mask"])
            first = mask.index(1)
            ids = ids[: first if first > 1 else max(len(ids) // 2, 1)][-limit:]
            prompts.append((source.name, ids))
    return prompts


def acceptance(
    target: Target, head: DraftHead, prompts: list[Prompt], cfg: EvalConfig, world: World
) -> dict:
    """Greedy decoding -> tau (tokens a verification), acceptance by depth, counts, seconds; and the
    same under `sources` by name where there are several. Every rank decodes its share of the
    prompts: all must call it, and get the same."""
    started = time.monotonic()
    model = EaModel(target, head=head, tree=cfg.tree)
    mine, found = prompts[world.rank :: world.size], []
    for start in range(0, len(mine), BATCH):
        ids = [ids for _, ids in mine[start : start + BATCH]]
        rows = model.generate(ids, max_new_tokens=cfg.max_new_tokens, temperature=0.0).rows
        found += [(row.cycles, len(row.tokens), row.accepted) for row in rows]
    rows = [None] * len(prompts)
    for rank, part in enumerate(world.gather(found)):
        rows[rank :: world.size] = part
    result, of = {**_counted(rows), "seconds": time.monotonic() - started}, defaultdict(list)
    for row, (source, _) in zip(rows, prompts, strict=True):
        of[source].append(row)
    if len(of) > 1:
        result["sources"] = {name: _counted(part) for name, part in of.items()}
    return result


def _counted(rows: list[tuple]) -> dict:
    """rows: of each prompt its cycles, its new tokens, and how many drafts each cycle accepted."""
    cycles = sum(cycles for cycles, _, _ in rows)
    gained = sum(tokens - 1 for _, tokens, _ in rows)
    return {
        "tau": gained / cycles if cycles else 0.0,
        "acceptance_by_depth": acceptance_by_depth([accepted for *_, accepted in rows]),
        "prompts": len(rows),
        "new_tokens": sum(tokens for _, tokens, _ in rows),
    }
