"""Drafting: the head over its own cache, grown into a tree.

b rows, K ingested tokens, k beams, F features, H hidden, D draft vocabulary.

Alignment: the head's position t pairs the target's feature at t with the token at t+1 and predicts
the token at t+2. After ingesting up to the root's predecessor its last output therefore predicts
the root's children, and a beam at tree depth d sits at head position length + d - 1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from kernels.grow_tree import best_beams, candidates

from .attention import TreeContext
from .cache import StaticKVCache
from .errors import EagleError
from .heads.head import DraftHead
from .linears import Exact
from .tree import DraftTree, TreeShape, rerank

CHUNK = 512  # tokens of a row that the head ingests in one pass


class Drafter(Protocol):
    """What the decode loop asks of whoever proposes tokens. `begin`: forget everything; so many
    rows of at most `capacity` committed tokens follow. `empty_rows`: a drafter over the same
    buffers with other rows in use, empty; `join` takes them over. `select`: go on with these rows.

    ingest: features [b, K, F] of newly committed positions, tokens [b, K] that follow each; counts
    [b] say how many of a row's K are real. expand: root [b] -> the tree to verify."""

    shape: TreeShape

    def begin(self, rows: int, capacity: int) -> None: ...
    def empty_rows(self, order: list[int]) -> Drafter: ...
    def select(self, keep: list[int]) -> None: ...
    def join(self, other: Drafter) -> None: ...
    def ingest(self, features, tokens, counts: torch.Tensor, host_counts: list[int]) -> None: ...
    def expand(self, root: torch.Tensor) -> DraftTree: ...


class HeadDrafter:
    """A draft head over a static cache of its layers. embed: the target's embedding, for a head
    without one. head_logits: the target's LM head, final hidden [..., H] -> [..., V], for a head
    without an output layer (EAGLE-1)."""

    def __init__(
        self,
        head: DraftHead,
        embed: Callable[[torch.Tensor], torch.Tensor],
        shape: TreeShape,
        head_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if not head.has_output and head_logits is None:
            raise EagleError("an EAGLE-1 head needs the target's LM head; give head_logits")
        self.head, self.embed = head, head.embed_tokens if head.config.own_embedding else embed
        self.logits = head.logits if head.has_output else head_logits
        self._linears = Exact(head.modules())
        self.compiled = None  # compiled passes, while a mode that has them is in use
        self.reshape(shape)

    def reshape(self, shape: TreeShape) -> None:
        """Draft trees of this shape from now on."""
        # fewer draft tokens than beams: nothing is left to fill the others with
        beams = min(shape.top_k, self.head.config.draft_vocab_size)
        self.shape = replace(shape, top_k=beams)

    @property
    def scratch(self) -> int:
        """Slots that a cycle needs past the committed ones."""
        return max(self.shape.depth * self.shape.top_k, self.shape.levels + 1)

    def begin(self, rows: int, capacity: int) -> None:
        c, weight = self.head.config, self.head.fc.weight
        size = c.num_layers, rows, c.num_key_value_heads, capacity + self.scratch, c.head_dim
        self.cache = StaticKVCache(*size, weight.dtype, weight.device)
        self._to_target = self.head.draft_token_ids()  # [D]
        self.last = weight.new_zeros(rows, c.hidden_size)
        self.first = weight.new_zeros(rows, c.draft_vocab_size, dtype=torch.float32)

    def empty_rows(self, order: list[int]) -> HeadDrafter:
        other = copy.copy(self)
        other.cache = self.cache.empty_rows(order)
        other.last = self.last.new_zeros(len(order), self.last.shape[1])
        other.first = self.first.new_zeros(len(order), self.first.shape[1])
        return other

    def select(self, keep: list[int]) -> None:
        self.cache.select(keep)
        self.last, self.first = self.last[keep], self.first[keep]

    def join(self, other: HeadDrafter) -> None:
        self.cache.join(other.cache)
        self.last = torch.cat([self.last, other.last])
        self.first = torch.cat([self.first, other.first])

    def _pass(
        self, hidden: torch.Tensor, tokens: torch.Tensor, context: TreeContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [b, N, H], tokens [b, N] -> the next pass's hidden [b, N, H], log-probabilities
        [b, N, D] float32 over the draft vocabulary."""
        inputs = map(context.pack, (hidden, tokens, context.positions))
        out, log_probs = (self.compiled or self).step(context, *inputs)
        return context.unpack(out), context.unpack(log_probs)

    # over packed tokens, [1, T, ...]; also what is exported to be compiled
    def run(self, hidden, tokens, positions, context) -> torch.Tensor:
        """The head's forward with our attention."""

        def over_cache(layer, q, k, v):
            return context.attend(layer, q, k, v, q.shape[-1] ** -0.5)

        return self.head(hidden, self.embed(tokens).to(hidden.dtype), positions, over_cache)

    def step(self, context, hidden, tokens, positions) -> tuple[torch.Tensor, torch.Tensor]:
        with self._linears.lent():
            out = self.run(hidden, tokens, positions, context)
            return out, self.log_probs(out)

    def read(self, context, features, tokens, positions, keep):
        """The target's features; the continuation is asked for of the tokens `keep` [b] only."""
        with self._linears.lent():
            out = self.run(self.head.fuse(features), tokens, positions, context)[:, keep]
            return out, self.log_probs(out)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden).float().log_softmax(-1)

    def ingest(self, features, tokens, counts, host_counts) -> None:
        b, K = tokens.shape
        if K > CHUNK:  # a mask of K x K is made
            for start in range(0, K, CHUNK):
                piece, some = slice(start, start + CHUNK), (counts - start).clamp(0, CHUNK)
                host = [min(max(n - start, 0), CHUNK) for n in host_counts]
                self.ingest(features[:, piece], tokens[:, piece], some, host)
            return
        cache = self.cache
        positions = cache.lengths[:, None] + torch.arange(K, device=tokens.device)
        if self.compiled is None and not any(cache.host_lengths):
            context = TreeContext(cache, positions, counts=host_counts)
        else:  # a chain behind what is committed
            causal = torch.ones(K, K, dtype=torch.bool, device=tokens.device).tril()
            context = TreeContext(cache, positions, causal.expand(b, K, K), positions, host_counts)
        inputs = map(context.pack, (features.to(self.last.dtype), tokens, positions))
        keep = counts.cumsum(0) - 1  # the last of each row among the packed tokens
        last, first = (x[0] for x in (self.compiled or self).read(context, *inputs, keep))
        if not all(host_counts):
            gained = (counts > 0)[:, None]
            last = torch.where(gained, last, self.last)
            first = torch.where(gained, first, self.first)
        self.last, self.first = last, first
        cache.advance(counts, host_counts)

    def expand(self, root: torch.Tensor) -> DraftTree:
        b, k, cache = root.shape[0], self.shape.top_k, self.cache
        score, token = candidates(self.first[:, None], None, self._to_target, k)
        tokens, scores, parents = [token], [score], [torch.zeros_like(token)]
        base = 1  # how many come before this level's candidates, the root included
        out, seen = self.last[:, None], root.new_zeros(b, 1, 0, dtype=torch.bool)
        for step in range(self.shape.depth):
            beam_score, pick, beam_tokens, hidden, seen = best_beams(
                score, token, out, seen, k
            )  # [b, k] three times, [b, k, H], [b, k, beams so far]
            positions = (cache.lengths + step)[:, None].expand(b, k)
            # no window asks for the positions of earlier beams
            context = TreeContext(cache, positions, seen, positions[:, :1].expand(b, seen.shape[2]))
            out, log_probs = self._pass(hidden, beam_tokens, context)  # [b, k, H], [b, k, D]
            parents.append((base + pick).repeat_interleave(k, dim=1))
            base += score.shape[1]
            score, token = candidates(log_probs, beam_score, self._to_target, k)
            tokens.append(token)
            scores.append(score)
        # k candidates at depth 1, k * k at each further one; the host need not wait for that
        place = torch.arange(base - 1 + score.shape[1], device=root.device)
        depth = (place - k).div(k * k, rounding_mode="floor") + 2
        every = (torch.cat(levels, 1) for levels in (tokens, parents, scores))
        return rerank(root, *every, depth, self.shape.num_nodes, self.shape.levels)


def following(ids: torch.Tensor, lengths: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Prompts [b, T] of lengths [b], and the roots [b] -> [b, T] the token that follows each."""
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return shifted.scatter(1, lengths[:, None] - 1, root[:, None])
