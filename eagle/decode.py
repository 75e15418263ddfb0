"""The decode loop: plain and speculative decoding are this one loop, without and with a drafter.

Knows token ids and stopping; knows nothing of text.

B rows, T prompt tokens, N tree nodes, K = 1 + longest path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .draft import Drafter
from .errors import EagleError
from .sampling import SamplingParams, process_tree
from .target import Target
from .tree import DraftTree
from .verify import verify


@dataclass(frozen=True)
class Stopping:
    """When a row is done. `stop(tokens)`: how many of a row's new tokens to keep, or None to go on."""

    max_new_tokens: int = 512
    eos_token_ids: frozenset[int] = frozenset()
    stop: Callable[[list[int]], int | None] | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("max_new_tokens", self.max_new_tokens),
            ("max_length", self.max_length),
        ):
            if not (isinstance(value, int) and value >= 1) and not (
                name == "max_length" and value is None
            ):
                raise EagleError(f"{name} must be a whole number of at least 1, not {value}")


@dataclass
class Row:
    """One request. `tokens` are new tokens, an end token kept once; `accepted[a]` counts the cycles in which
    a draft tokens were accepted, before any cut at an end token or limit."""

    prompt: list[int]
    budget: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "eos", "stop" or "length"
    cycles: int = 0
    accepted: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def tau(self) -> float:
        """Tokens gained per verification; the first token comes from the prompt's own pass."""
        return (len(self.tokens) - 1) / self.cycles if self.cycles else 0.0

    def take(self, gained: list[int], stopping: Stopping) -> int:
        """Append what this row may still have of `gained`; returns how many."""
        gained = gained[: self.budget - len(self.tokens)]
        for place, token in enumerate(gained):
            if token in stopping.eos_token_ids:
                gained = gained[: place + 1]
                self.finish_reason = "eos"
                break
        before = len(self.tokens)
        self.tokens += gained
        if stopping.stop is not None:
            keep = stopping.stop(self.tokens)
            if keep is not None:
                self.tokens = self.tokens[: max(keep, 0)]
                self.finish_reason = "stop"
        if not self.done and len(self.tokens) >= self.budget:
            self.finish_reason = "length"
        return min(len(gained), max(len(self.tokens) - before, 0))


@dataclass
class Timings:
    """Seconds spent; meaningful on accelerators only when the loop is asked to synchronise."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0


class Clock:
    def __init__(self, device: torch.device, synchronise: bool) -> None:
        self.device, self.synchronise = device, synchronise and device.type == "cuda"
        self.last = time.perf_counter()

    def lap(self) -> float:
        if self.synchronise:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


@torch.inference_mode()
def decode(
    target: Target,
    prompts: Sequence[list[int]],
    *,
    sampling: SamplingParams,
    seeds: Sequence[int],
    stopping: Stopping,
    drafter: Drafter | None = None,
    logits_processor=None,
    timings: Timings | None = None,
    synchronise: bool = False,
    on_cache: Callable | None = None,
) -> Iterator[list[Row]]:
    """Yields the rows after the prompt's pass and after every cycle; their tokens grow in place.

    `on_cache(cache, drafter)` is called after each commit, to look at what the caches hold.

    Lossless: each yielded token is the target's own choice at its position, whatever the drafter proposed.
    """
    rows = [Row(list(p), budget_of(len(p), stopping, target.max_positions)) for p in prompts]
    timings = timings if timings is not None else Timings()
    device, draft = target.device, drafter is not None
    levels = drafter.shape.levels if draft else 0
    nodes = drafter.shape.num_nodes if draft else 1
    lengths = [len(p) for p in prompts]
    capacity = max(n + r.budget for n, r in zip(lengths, rows, strict=True))
    cache = target.new_cache(len(rows), capacity + nodes)
    if draft:
        drafter.begin(len(rows), capacity)
    seed_tensor = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    clock = Clock(device, synchronise)

    def choose(
        logits: torch.Tensor, tree: DraftTree | None, positions: torch.Tensor
    ) -> torch.Tensor:
        if logits_processor is not None:
            logits = process_tree(
                logits_processor, [r.prompt + r.tokens for r in rows], tree, logits
            )
        return sampling.choose(logits, seed_tensor, positions)

    # the prompt's pass: the target writes its cache and chooses the root
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids, length_tensor = ids.to(device), torch.tensor(lengths, device=device)
    logits, features = target.prefill(ids, length_tensor, lengths, cache, features=draft)
    root = choose(logits, None, length_tensor[:, None])[:, 0]
    for row, token in zip(rows, root.tolist(), strict=True):
        row.take([token], stopping)
    if draft and not all(row.done for row in rows):
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).scatter(
            1, length_tensor[:, None] - 1, root[:, None]
        )
        drafter.ingest(features, following, length_tensor, lengths)
    timings.prefill += clock.lap()
    if on_cache is not None:
        on_cache(cache, drafter)
    yield rows

    while not all(row.done for row in rows):
        tree = drafter.expand(root) if draft else DraftTree.root_only(root)
        timings.draft += clock.lap()
        logits, features = target.verify_tree(
            tree.tokens, tree.depth, tree.mask, cache, features=draft
        )
        choices = choose(logits, tree, cache.lengths[:, None] + tree.depth + 1)
        verdict = verify(tree, choices, levels)
        outcome = torch.cat(
            [verdict.num_accepted[:, None], verdict.tokens], dim=1
        ).tolist()  # the one read
        timings.verify += clock.lap()

        counts = []
        for row, (accepted, *gained) in zip(rows, outcome, strict=True):
            if row.done:
                counts.append(0)
                continue
            row.cycles += 1
            row.accepted += [0] * (levels + 1 - len(row.accepted))
            row.accepted[accepted] += 1
            counts.append(row.take(gained[: accepted + 1], stopping))
        count_tensor = torch.tensor(counts, device=device)
        if draft:
            cache.commit(verdict.path, count_tensor)
        cache.advance(count_tensor, counts)
        K = max(counts)
        last = (count_tensor - 1).clamp_min(0)[:, None]
        root = torch.where(count_tensor > 0, verdict.tokens.gather(1, last)[:, 0], root)
        if draft and K > 0 and not all(row.done for row in rows):
            path = verdict.path[:, :K, None].expand(-1, -1, features.shape[-1])
            drafter.ingest(features.gather(1, path), verdict.tokens[:, :K], count_tensor, counts)
        timings.commit += clock.lap()
        if on_cache is not None:
            on_cache(cache, drafter)
        yield rows


def budget_of(prompt_length: int, stopping: Stopping, max_positions: int) -> int:
    """How many new tokens a row may have; raises when not even one fits."""
    limit = min(max_positions, stopping.max_length or max_positions)
    if prompt_length < 1:
        raise EagleError("a prompt is empty; give at least one token")
    if prompt_length >= limit:
        raise EagleError(
            f"the prompt has {prompt_length} tokens and the limit is {limit} with at least one new token; "
            "shorten the prompt or raise max_length (never above the model's own limit)"
        )
    return min(stopping.max_new_tokens, limit - prompt_length)
