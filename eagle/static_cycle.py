"""A cycle whose shapes and addresses never change, so that a CUDA graph can hold it: plain and
speculative.

The same passes as `eagle.decode`, without the host: lengths live on the device alone
(`host_lengths` is None), what a cycle gains is written in place, and the head ingests as many
tokens as a path can have, of which only the real ones count. Rows never end here: a caller that
serves requests reads `num_accepted` and `tokens`.

b rows, N nodes, K = 1 + longest path, F features."""

from __future__ import annotations

import copy

import torch

from eagle.attention import TreeContext
from eagle.draft import HeadDrafter, following
from eagle.target import Target, padded
from eagle.tree import DraftTree
from eagle.verify import force, verify
from kernels.choose import choose


class StaticCycle:
    """A greedy cycle, plain without a drafter. accept: keep that many draft tokens, right or wrong;
    None: verify.

    root [b]: chosen, and not yet in the target's cache. After `step`: num_accepted [b], and tokens
    [b, K], of which num_accepted + 1 are gained."""

    def __init__(
        self,
        target: Target,
        drafter: HeadDrafter | None,
        rows: int,
        capacity: int,
        accept: int | None = None,
    ) -> None:
        self.target, self.drafter, self.accept = target, copy.copy(drafter), accept
        nodes, self.levels = (drafter.shape.num_nodes, drafter.shape.levels) if drafter else (1, 0)
        self.cache = target.new_cache(rows, capacity + nodes)
        self.caches = [self.cache]
        if drafter is not None:
            self.drafter.begin(rows, capacity)
            self.caches.append(self.drafter.cache)
        integers = {"dtype": torch.int64, "device": target.device}
        for cache in self.caches:
            cache.lengths, cache.host_lengths = torch.zeros(rows, **integers), None
        self.root, self.num_accepted, self.seeds = torch.zeros(3, rows, **integers)
        self.tokens = torch.zeros(rows, self.levels + 1, **integers)

    @torch.inference_mode()
    def begin(self, prompts: list[list[int]]) -> None:
        """The prompts' pass: the caches are filled, the roots chosen."""
        ids, lengths, counts = padded(prompts, self.target.device)
        cache, draft = self.cache.empty_rows(self.cache.order), self.drafter is not None
        logits, features = self.target.prefill(ids, lengths, counts, cache, features=draft)
        self.root.copy_(choose(logits, self.seeds, lengths[:, None])[:, 0])
        for cache in self.caches:
            cache.lengths.copy_(lengths)
        if draft:
            reader = self.drafter.empty_rows(self.drafter.cache.order)
            reader.ingest(features, following(ids, lengths, self.root), lengths, counts)
            self.drafter.last.copy_(reader.last)
            self.drafter.first.copy_(reader.first)

    @torch.inference_mode()
    def step(self) -> None:
        draft = self.drafter is not None
        tree = self.drafter.expand(self.root) if draft else DraftTree.root_only(self.root)
        logits, features = self.target.verify_tree(
            tree.tokens, tree.depth, tree.mask, self.cache, features=draft
        )
        choices = choose(logits, self.seeds, self.cache.lengths[:, None] + tree.depth + 1)
        if not draft:
            self.cache.lengths.add_(1)
            self.tokens.copy_(choices)
            self.root.copy_(choices[:, 0])
            return
        if self.accept is None:
            verdict = verify(tree, choices, self.levels)
        else:
            verdict = force(self.accept, tree, choices, self.levels)
        counts = verdict.num_accepted + 1
        self.cache.commit(verdict.path, counts)
        self.cache.lengths.add_(counts)
        path = verdict.path[..., None].expand(-1, -1, features.shape[-1])
        self._ingest(features.gather(1, path), verdict.tokens, counts)
        self.root.copy_(verdict.tokens.gather(1, (counts - 1)[:, None])[:, 0])
        self.tokens.copy_(verdict.tokens)
        self.num_accepted.copy_(verdict.num_accepted)

    def _ingest(self, features, tokens, counts) -> None:
        """`HeadDrafter.ingest` at a fixed K: what follows a row's real tokens is run, and
        overwritten by the next."""
        drafter, cache = self.drafter, self.drafter.cache
        b, K = tokens.shape
        positions = cache.lengths[:, None] + torch.arange(K, device=tokens.device)
        causal = torch.ones(K, K, dtype=torch.bool, device=tokens.device).tril()
        context = TreeContext(cache, positions, causal.expand(b, K, K), positions)
        states = map(context.pack, (features.to(drafter.last.dtype), tokens, positions))
        keep = torch.arange(0, b * K, K, device=tokens.device) + counts - 1
        last, first = drafter.read(context, *states, keep)
        drafter.last.copy_(last[0])
        drafter.first.copy_(first[0])
        cache.lengths.add_(counts)
