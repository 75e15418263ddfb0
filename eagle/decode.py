"""The decode loop: plain and speculative decoding, fixed batches and queues of requests.

b rows in flight, T prompt tokens, N tree nodes, K = 1 + longest path, F features, V vocabulary."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .cache import StaticKVCache
from .draft import Drafter, following
from .plan import Plan
from .request import Row
from .sampling import Sampler
from .target import Target, padded
from .tree import DraftTree
from .verify import Verdict, verify


@dataclass
class Timings:
    """Seconds spent; meaningful on accelerators only when the loop is asked to synchronise."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0


@torch.inference_mode()
def decode(
    target: Target,
    rows: Sequence[Row],
    *,
    slots: int | None = None,
    capacity: int | None = None,
    drafter: Drafter | None = None,
    timings: Timings | None = None,
    synchronise: bool = False,
    on_cache: Callable | None = None,
    verify: Callable[[DraftTree, torch.Tensor, int], Verdict] = verify,
    plan: Plan | None = None,
) -> Iterator[Sequence[Row]]:
    """Runs `rows`, at most `slots` at a time, the next one entering as soon as one is done. Yields
    those in flight after every prompt pass and every cycle; their tokens grow in place. Lossless:
    each token is the target's own choice at its position, whatever the drafter proposed.

    capacity: tokens that a slot can hold, by default what the largest row needs. plan: how much to
    draft, cycle by cycle; by default the drafter's whole tree. on_cache(cache, drafter) is called
    after each commit, to look at what the caches hold."""
    if not rows:
        return
    slots = min(slots or len(rows), len(rows))
    needed = max(len(row.prompt) + row.budget for row in rows)
    batch = Batch(target, drafter, slots, max(capacity or 0, needed), verify, plan)
    timings, last = timings or Timings(), time.perf_counter()

    def lap(part: str) -> None:
        """What went by since the last lap went into this part."""
        nonlocal last
        if synchronise and target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        before, last = last, time.perf_counter()
        setattr(timings, part, getattr(timings, part) + last - before)

    waiting = collections.deque(rows)
    while waiting or batch.rows:
        if waiting and batch.free:
            batch.admit([waiting.popleft() for _ in batch.free[: len(waiting)]])
            lap("prefill")
        else:
            batch.settle()
            lap("commit")
            if on_cache is not None:
                on_cache(batch.cache, batch.drafter)
            tree = batch.expand()
            lap("draft")
            batch.judge(tree)
            lap("verify")
        yield batch.rows
        batch.drop_finished()


class Batch:
    """The rows in flight; lists and tensors are in the order of `rows`. What a verification gained
    is `pending` until `settle` brings it into the caches: decided, and not yet run by anyone."""

    def __init__(self, target: Target, drafter: Drafter | None, slots, capacity, verify, plan):
        self.target, self.verify, self.plan = target, verify, plan
        nodes = drafter.shape.num_nodes if drafter else 1
        self.cache = target.new_cache(slots, capacity + nodes).empty_rows([])
        self.drafter = None
        if drafter is not None:
            drafter.begin(slots, capacity)
            self.drafter = drafter.empty_rows([])
        self.free = list(range(slots))
        self.rows: list[Row] = []
        self.root = torch.zeros(0, dtype=torch.int64, device=target.device)
        self.pending: Pending | None = None
        # committed, and not yet seen by the head, with the rows that it is of
        self.deferred: list[tuple[list[Row], Pending]] = []
        self.drafting = drafter is not None
        self._sampler: Sampler | None = None

    def caches(self) -> list[StaticKVCache]:
        return [self.cache] + ([self.drafter.cache] if self.drafter is not None else [])

    def admit(self, rows: list[Row]) -> None:
        """The prompts' pass: the target writes its cache, roots are chosen, the head follows."""
        order, self.free = self.free[: len(rows)], self.free[len(rows) :]
        cache, device = self.cache.empty_rows(order), self.target.device
        ids, lengths, host_lengths = padded([row.prompt for row in rows], device)
        draft = self.drafter is not None
        logits, features = self.target.prefill(ids, lengths, host_lengths, cache, features=draft)
        root = choose(rows, sampler_of(rows, device), logits, None, lengths[:, None])
        firsts = zip(rows, root.tolist(), strict=True)
        counts = [row.take(token) for row, token in firsts]
        keep_logprobs(rows, logits, torch.zeros_like(root), root, counts)
        self.settle()
        if draft:
            tokens = following(ids, lengths, root[:, 0])
            drafter = self.drafter.empty_rows(order)
            if self.plan is not None and self.plan.rests(len(self.rows) + len(rows)):
                prompt = Pending(host_lengths, lengths, None, tokens, features)
                self.deferred.append((rows, prompt))
            else:
                self.catch_up()
                drafter.ingest(features, tokens, lengths, host_lengths)
            self.drafter.join(drafter)
        self.cache.join(cache)
        self.rows = self.rows + rows
        self.root, self._sampler = torch.cat([self.root, root[:, 0]]), None

    def settle(self) -> None:
        """Bring what was gained into the caches: accepted slots move to the front; the head ingests
        when it is next asked to draft."""
        pending, self.pending = self.pending, None
        if pending is None or not self.rows:
            return
        if self.drafting:
            self.cache.commit(pending.path, pending.counts)
        self.cache.advance(pending.counts, pending.host_counts)
        last = (pending.counts - 1)[:, None]
        self.root = pending.tokens.gather(1, last)[:, 0]
        if self.drafter is not None:
            self.deferred.append((self.rows, pending))

    def catch_up(self) -> None:
        """The head ingests what was deferred."""
        if self.deferred:
            late, self.deferred = merge(self.deferred, self.rows), []
            self.drafter.ingest(late.features, late.tokens, late.counts, late.host_counts)

    def expand(self) -> DraftTree:
        self.drafting = self.drafter is not None
        if self.plan is not None:
            shape = self.plan.begin(len(self.rows))
            self.drafting = shape is not None
            if self.drafting:
                self.drafter.reshape(shape)
        if not self.drafting:
            return DraftTree.root_only(self.root)
        self.catch_up()
        return self.drafter.expand(self.root)

    def judge(self, tree: DraftTree) -> None:
        """One pass of the target over the tree: its choices, and what each row gains by them."""
        draft = self.drafter is not None  # features are kept for it though it may not draft now
        logits, features = self.target.verify_tree(
            tree.tokens, tree.depth, tree.mask, self.cache, features=draft
        )
        self._sampler = self._sampler or sampler_of(self.rows, self.target.device)
        positions = self.cache.lengths[:, None] + tree.depth + 1
        choices = choose(self.rows, self._sampler, logits, tree, positions)
        levels = self.drafter.shape.levels if self.drafting else 0
        verdict = self.verify(tree, choices, levels)
        outcome = torch.cat([verdict.num_accepted[:, None], verdict.tokens], dim=1).tolist()
        counts, kept = [], []
        for row, (accepted, *gained) in zip(self.rows, outcome, strict=True):
            if not row.done:  # else cancelled, or failed in this very pass: it takes nothing
                row.cycles += 1
                row.accepted += [0] * (levels + 1 - len(row.accepted))
                row.accepted[accepted] += 1
                kept.append(accepted)
            counts.append(row.take(gained[: accepted + 1]))
        keep_logprobs(self.rows, logits, verdict.path, verdict.tokens, counts)
        K = max(max(counts), 1)
        path = verdict.path[:, :K]
        if self.drafting:
            features = features.gather(1, path[..., None].expand(-1, -1, features.shape[-1]))
        count_tensor = torch.tensor(counts, device=self.target.device)
        self.pending = Pending(counts, count_tensor, path, verdict.tokens[:, :K], features)
        if self.plan is not None and self.drafting:
            self.plan.end(kept)

    def drop_finished(self) -> None:
        """Their slots become free; the others go on without them."""
        keep = [i for i, row in enumerate(self.rows) if not row.done]
        if len(keep) == len(self.rows):
            return
        left = set(self.free) | set(self.cache.order)
        self.rows = [self.rows[i] for i in keep]
        self.cache.select(keep)
        self.free = sorted(left - set(self.cache.order))
        if self.drafter is not None:
            self.drafter.select(keep)
        self.root, self._sampler = self.root[keep], None
        if self.pending is not None:
            self.pending = self.pending.select(keep)
        self.deferred = [x for x in self.deferred if any(not row.done for row in x[0])]


@dataclass
class Pending:
    """Tokens gained: counts [b]; path (None where they are of no one tree), tokens [b, K]; features
    [b, K, F] or None."""

    host_counts: list[int]
    counts: torch.Tensor
    path: torch.Tensor | None
    tokens: torch.Tensor
    features: torch.Tensor | None

    def select(self, keep: list[int]) -> Pending:
        features = None if self.features is None else self.features[keep]
        counts = [self.host_counts[i] for i in keep]
        return Pending(counts, self.counts[keep], self.path[keep], self.tokens[keep], features)


def merge(parts: list[tuple[list[Row], Pending]], rows: list[Row]) -> Pending:
    """What `rows` gained in all parts, each row's without gaps."""
    if len(parts) == 1 and parts[0][0] is rows:
        return parts[0][1]
    places: dict[int, list[int]] = {id(row): [] for row in rows}  # among the tokens of all parts
    start = 0
    for members, part in parts:
        K = part.tokens.shape[1]
        for row, count in zip(members, part.host_counts, strict=True):
            places.get(id(row), []).extend(range(start, start + count))
            start += K
    counts = [len(found) for found in places.values()]
    lines = [found + [0] * (max(counts) - len(found)) for found in places.values()]
    device = parts[0][1].tokens.device
    index = torch.tensor(lines, device=device)
    tokens = torch.cat([part.tokens.flatten() for _, part in parts])[index]
    features = torch.cat([part.features.flatten(0, 1) for _, part in parts])[index]
    return Pending(counts, torch.tensor(counts, device=device), None, tokens, features)


def sampler_of(rows: list[Row], device: torch.device) -> Sampler:
    return Sampler([r.request.sampling for r in rows], [r.request.seed for r in rows], device)


def choose(rows: list[Row], sampler: Sampler, logits, tree, positions) -> torch.Tensor:
    """logits [b, N, V], positions [b, N] of the tokens to be chosen -> choices [b, N]."""
    choices = sampler.choose(logits, positions)
    for i, row in enumerate(rows):
        if row.request.processor is None or row.done:
            continue
        tree = tree or DraftTree.root_only(positions[:, 0])
        try:
            follow(row, tree.tokens[i], tree.parents[i], logits[i], positions[i], choices[i])
        except Exception as error:
            row.fail("the logits processor", error)
    return choices


def follow(row: Row, tokens, parents, logits, positions, choices: torch.Tensor) -> None:
    """Choices of a row with processors, from the root on, only where they lead: so processors are
    called as plain decoding calls them, once a token and in its order, and may keep state. tokens,
    parents, positions [N], logits [N, V]; writes into choices [N]."""
    request, seen = row.request, row.seen
    sampler = sampler_of([row], logits.device)
    edges = zip(parents.tolist(), tokens.tolist(), strict=True)
    child = {edge: n for n, edge in enumerate(edges) if n}
    node, left = 0, row.budget - len(row.tokens)
    while node is not None:
        scores = request.processor(seen, logits[node])
        choice = sampler.choose(scores[None, None], positions[node : node + 1][None])[0, 0]
        choices[node] = choice
        token, left = int(choice), left - 1
        if token in request.stopping.eos_token_ids or not left:
            return
        seen, node = [*seen, token], child.get((node, token))


def keep_logprobs(rows: list[Row], logits, path, tokens, counts: list[int]) -> None:
    """For rows that ask: the target's own log-probability, unprocessed, of each token gained."""
    for i, row in enumerate(rows):
        if row.request.logprobs and counts[i]:
            at = logits[i, path[i, : counts[i]]].float().log_softmax(-1)
            row.logprobs += at.gather(1, tokens[i, : counts[i], None])[:, 0].tolist()
            del row.logprobs[len(row.tokens) :]
