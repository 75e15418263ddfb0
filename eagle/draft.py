"""Drafting: the head over its own cache, grown into a tree.

Knows features, tokens and trees; knows nothing of the target's weights, of sampling or of text.

B rows, K ingested tokens, k beams, F features, H hidden, D draft vocabulary.

Alignment: the head's position t pairs the target's feature at t with the token at t+1 and predicts the
token at t+2. After ingesting up to the root's predecessor its last output therefore predicts the root's
children, and a beam at tree depth d sits at head position length + d - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .attention import TreeContext, attend_tree
from .cache import StaticKVCache
from .head import Eagle3Head
from .tree import DraftTree, TreeShape, rerank


class Drafter(Protocol):
    """What the decode loop asks of whoever proposes tokens."""

    shape: TreeShape

    def begin(self, rows: int, capacity: int) -> None:
        """Forget everything; `rows` rows of at most `capacity` committed tokens follow."""

    def ingest(
        self,
        features: torch.Tensor,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        host_counts: list[int],
    ) -> None:
        """features [B, K, F] of newly committed positions, tokens [B, K] that follow each; counts [B] say
        how many of a row's K are real."""

    def expand(self, root: torch.Tensor) -> DraftTree:
        """root [B] -> the tree to verify."""


class HeadDrafter:
    """An EAGLE-3 head with a one-layer static cache."""

    def __init__(
        self, head: Eagle3Head, embed: Callable[[torch.Tensor], torch.Tensor], shape: TreeShape
    ) -> None:
        self.head, self.embed = head, embed
        # fewer draft tokens than beams: nothing is left to fill the others with
        beams = min(shape.top_k, head.config.draft_vocab_size)
        self.shape = TreeShape(shape.total_token, shape.depth, beams)
        k, depth = self.shape.top_k, self.shape.depth
        device = head.fc.weight.device
        self._levels = torch.cat(
            [torch.ones(k, dtype=torch.int64), torch.arange(2, depth + 2).repeat_interleave(k * k)]
        ).to(device)
        self._eye = torch.eye(k, dtype=torch.bool, device=device)[None]

    def begin(self, rows: int, capacity: int) -> None:
        c, weight = self.head.config, self.head.fc.weight
        scratch = max(self.shape.depth * self.shape.top_k, self.shape.levels + 1)
        self.cache = StaticKVCache(
            1,
            rows,
            c.num_key_value_heads,
            capacity + scratch,
            c.head_dim,
            weight.dtype,
            weight.device,
        )
        self.last = torch.zeros(rows, c.hidden_size, dtype=weight.dtype, device=weight.device)

    def _pass(
        self, hidden: torch.Tensor, tokens: torch.Tensor, context: TreeContext
    ) -> torch.Tensor:
        """One head pass: hidden [B, N, H], tokens [B, N] -> pre-norm hidden [B, N, H]."""
        cache = self.cache

        def over_cache(q, k, v):
            return attend_tree(context, q, *cache.update(k, v, 0), q.shape[-1] ** -0.5)

        return self.head(hidden, self.embed(tokens).to(hidden.dtype), context.positions, over_cache)

    def ingest(self, features, tokens, counts, host_counts) -> None:
        B, K = tokens.shape
        cache = self.cache
        live = cache.open(K)
        positions = cache.lengths[:, None] + torch.arange(K, device=tokens.device)
        context = TreeContext(cache.lengths, positions, live, cache.row_ends(K))
        if any(cache.host_lengths):  # not the prompt's pass: a chain behind what is committed
            causal = torch.ones(K, K, dtype=torch.bool, device=tokens.device).tril()
            context.mask, context.tree_positions = causal.expand(B, K, K), positions
        out = self._pass(self.head.fc(features.to(self.last.dtype)), tokens, context)
        last = out.gather(1, (counts - 1).clamp_min(0)[:, None, None].expand(B, 1, out.shape[-1]))[
            :, 0
        ]
        self.last = torch.where((counts > 0)[:, None], last, self.last)
        cache.advance(counts, host_counts)

    def _log_probs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best continuations: hidden [B, N, H] -> log-probabilities and draft ids [B, N, k]."""
        logits = self.head.logits(hidden).float()
        best = logits.topk(self.shape.top_k, dim=-1)
        return best.values - logits.logsumexp(-1, keepdim=True), best.indices

    def expand(self, root: torch.Tensor) -> DraftTree:
        B, k, head, cache = root.shape[0], self.shape.top_k, self.head, self.cache
        score, ids = self._log_probs(self.last[:, None])  # [B, 1, k]
        beam_score, beam_tokens = score[:, 0], head.to_target(ids[:, 0])  # [B, k]
        beam_place = torch.arange(1, k + 1, device=root.device).expand(B, k)
        hidden = self.last[:, None].expand(B, k, -1)
        tokens, scores, parents = [beam_tokens], [beam_score], [torch.zeros_like(beam_tokens)]
        seen = self._eye.expand(B, k, k)  # [B, k, beams so far]
        for step in range(self.shape.depth):
            live = cache.open(k, offset=step * k)
            positions = (cache.lengths + step)[:, None].expand(B, k)
            ends = cache.row_ends((step + 1) * k)
            context = TreeContext(cache.lengths, positions, live, ends, seen, positions)
            out = self._pass(hidden, beam_tokens, context)  # [B, k, H]
            score, ids = self._log_probs(out)
            score = (beam_score[..., None] + score).flatten(1)  # [B, k*k]
            token = head.to_target(ids.flatten(1))
            tokens.append(token)
            scores.append(score)
            parents.append(beam_place.repeat_interleave(k, dim=1))
            if step + 1 < self.shape.depth:
                beam_score, pick = score.topk(k, dim=-1)
                beam_place = 1 + k + step * k * k + pick
                beam_tokens = token.gather(1, pick)
                origin = pick // k
                hidden = out.gather(1, origin[..., None].expand(B, k, out.shape[-1]))
                inherited = seen.gather(1, origin[..., None].expand(B, k, seen.shape[-1]))
                seen = torch.cat([inherited, self._eye.expand(B, k, k)], dim=-1)
        return rerank(
            root, torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), self._levels,
            self.shape.num_nodes, self.shape.levels,
        )  # fmt: skip
