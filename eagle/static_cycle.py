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


class StaticPlain:
    """One greedy token a row and step: `tokens` [b, 1] are chosen and not yet in the cache."""

    def __init__(self, target: Target, rows: int, capacity: int) -> None:
        self.target, self.cache = target, target.new_cache(rows, capacity + 1)
        device = target.device
        self.cache.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache.host_lengths = None
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def begin(self, prompts: list[list[int]]) -> None:
        """The prompts' pass."""
        ids, lengths, counts = padded(prompts, self.target.device)
        cache = self.cache.empty_rows(self.cache.order)
        logits, _ = self.target.prefill(ids, lengths, counts, cache, features=False)
        self.cache.lengths.copy_(lengths)
        self.tokens.copy_(choose(logits, self.seeds, lengths[:, None]))

    @torch.inference_mode()
    def step(self) -> None:
        tree = DraftTree.root_only(self.tokens[:, 0])
        logits, _ = self.target.verify_tree(
            tree.tokens, tree.depth, tree.mask, self.cache, features=False
        )
        chosen = choose(logits, self.seeds, self.cache.lengths[:, None] + 1)
        self.cache.lengths.add_(1)
        self.tokens.copy_(chosen)


class StaticCycle:
    """A greedy speculative cycle. accept: keep that many draft tokens, right or wrong; None:
    verify.

    After `step`: num_accepted [b], and tokens [b, K], of which num_accepted + 1 are gained."""

    def __init__(
        self, target: Target, drafter: HeadDrafter, rows: int, capacity: int, accept: int | None
    ) -> None:
        self.target, self.drafter, self.accept = target, copy.copy(drafter), accept
        shape, device = drafter.shape, target.device
        self.cache = target.new_cache(rows, capacity + shape.num_nodes)
        self.drafter.begin(rows, capacity)
        for cache in self.caches:
            cache.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
            cache.host_lengths = None
        self.levels = shape.levels
        integers = {"dtype": torch.int64, "device": device}
        self.root = torch.zeros(rows, **integers)
        self.tokens = torch.zeros(rows, self.levels + 1, **integers)
        self.num_accepted = torch.zeros(rows, **integers)
        self.seeds = torch.zeros(rows, **integers)

    @property
    def caches(self) -> list:
        return [self.cache, self.drafter.cache]

    @torch.inference_mode()
    def begin(self, prompts: list[list[int]]) -> None:
        """The prompts' pass: both caches are filled, the roots chosen."""
        ids, lengths, counts = padded(prompts, self.target.device)
        cache = self.cache.empty_rows(self.cache.order)
        logits, features = self.target.prefill(ids, lengths, counts, cache, features=True)
        self.root.copy_(choose(logits, self.seeds, lengths[:, None])[:, 0])
        reader = self.drafter.empty_rows(self.drafter.cache.order)
        reader.ingest(features, following(ids, lengths, self.root), lengths, counts)
        self.cache.lengths.copy_(lengths)
        self.drafter.cache.lengths.copy_(lengths)
        self.drafter.last.copy_(reader.last)
        self.drafter.first.copy_(reader.first)

    @torch.inference_mode()
    def step(self) -> None:
        tree = self.drafter.expand(self.root)
        logits, features = self.target.verify_tree(
            tree.tokens, tree.depth, tree.mask, self.cache, features=True
        )
        positions = self.cache.lengths[:, None] + tree.depth + 1
        choices = choose(logits, self.seeds, positions)
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
        packed = map(context.pack, (features.to(drafter.last.dtype), tokens, positions))
        states, following, at = packed
        out = context.unpack(drafter.run(drafter.head.fuse(states), following, at, context))
        place = (counts - 1)[:, None, None].expand(b, 1, out.shape[-1])
        last = out.gather(1, place)[:, 0]
        drafter.last.copy_(last)
        drafter.first.copy_(drafter.log_probs(last))
        cache.lengths.add_(counts)
