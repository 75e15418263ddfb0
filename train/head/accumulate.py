"""Forward and backward of one step's rows: what a rank adds to the gradient before it is shared.

B rows of a micro-batch, G sources, S unrolled steps, C columns of `train.head.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train.head import guards
from train.head.distributed import World
from train.head.engine import Engine
from train.head.loader import MicroBatch, Steps
from train.head.metrics import by_source
from train.head.setup import Parts
from train.head.teacher import Teacher, feature_noise, hidden_and_features, with_noise
from train.head.ttt import Plan, compile_errors_told, plan_unroll
from train.tracking.recorder import Recorder


class Accumulator:
    """Call it with a step's micro-batches, then `engine.update()`.

    pieces: into how many parts a micro-batch is cut so that it fits into memory; part of a
    checkpoint.
    """

    def __init__(
        self,
        cfg: HeadTrainConfig,
        world: World,
        parts: Parts,
        engine: Engine,
        steps: Steps,
        seen: Recorder,
        warn: Callable[[str], None],
    ) -> None:
        self.cfg, self.world, self.parts, self.engine = cfg, world, parts, engine
        self.steps, self.seen, self.warn = steps, seen, warn
        self.draft_ids = parts.head.draft_token_ids().to(world.device)
        self.gradients = guards.GradientWatch(parts.head, world.device)
        self.noise = feature_noise(cfg, parts.head.config.method)
        self.pieces = 1
        self.step = 0  # number of the step that is worked on

    def __call__(self, batches: list[MicroBatch], step: int) -> torch.Tensor:
        """Add the gradient of step number `step`'s rows -> this rank's sums [G, S, C] for the
        metrics.

        When memory does not suffice on some rank, what was added is forgotten and the step begun
        again in micro-batches of half the rows: the same rows, the same gradient.
        """
        self.step = step
        while True:
            parts = [part for batch in batches for part in batch.cut(self.pieces)]
            failure, done = None, []
            try:
                with compile_errors_told(self.cfg.train.compile):
                    done = self._forward_backward(parts)
            except (RuntimeError, MemoryError) as error:
                if not guards.out_of_memory(error):
                    raise
                failure = " ".join(str(error).split())[:200]
            if failure and not self.engine.can_forget:
                raise guards.too_large(failure, self.cfg.train.zero)
            problem = self._not_finite(parts, done)
            lacking, bad = self.world.max([float(failure is not None), float(problem is not None)])
            if lacking:
                self._cut_smaller(failure, parts)
            elif bad:
                raise EagleError(next(text for text in self.world.gather(problem) if text))
            else:
                count = len(self.parts.data.sources)
                pairs = zip(parts, done, strict=True)
                return sum(by_source(sums, part.source, count) for part, (_, sums, _) in pairs)

    def require_finite_norm(self, norm: float) -> None:
        """norm: of the gradient that all ranks share; each rank's own were finite."""
        if not math.isfinite(norm):
            place = f"step {self.step}, summed over {self.world.size} ranks"
            raise EagleError(guards.not_finite(f"gradient norm is {norm}", place))

    def _forward_backward(self, parts: list[MicroBatch]) -> list[tuple]:
        """For each micro-batch its loss, its sums [B, S, C] and which gradients were not finite."""
        with self.seen.phase("data"):
            planned = [(part, self._plan(part)) for part in parts]
            totals = self.world.sum(torch.stack([plan.counts for _, plan in planned]).sum(0))
            totals = totals.to(self.world.device, torch.float32)
        done = []
        for n, (part, plan) in enumerate(planned):
            loss, sums = self._forward(part, plan, totals)
            with self.seen.phase("backward"):
                self.engine.backward(loss, last=n + 1 == len(planned))
            done.append((loss.detach(), sums.detach(), self.gradients.take()))
        return done

    def _plan(self, batch: MicroBatch) -> Plan:
        if int(batch.input_ids.max()) >= self.parts.target.vocab_size:
            raise EagleError(
                f"rows {self._named(batch)} hold token ids outside the target's vocabulary of "
                f"{self.parts.target.vocab_size}; the data was made with another tokenizer"
            )
        real = batch.attention_mask
        mask = real if self.cfg.loss.tokens == "all" else batch.loss_mask
        return plan_unroll(mask, self.cfg.train.ttt_steps, batch.loss_weight, real.sum(1))

    def _forward(
        self, batch: MicroBatch, plan: Plan, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.world.device
        with self.seen.phase("target"), torch.no_grad():
            ids = batch.input_ids.to(device, non_blocking=True)
            mask = batch.attention_mask.to(device, non_blocking=True)
            plan = plan.to(device)
            hidden, features = hidden_and_features(self.parts.states, ids, mask)
            features = with_noise(features, mask, self.noise)
            embeds = self.parts.embed(ids[mask.bool()])
            teacher = Teacher.of(self.parts.target, hidden[plan.sources], self.draft_ids)
            del hidden
        with self.seen.phase("head"):
            return self.engine(features, embeds, plan, teacher, totals)

    def _cut_smaller(self, failure: str | None, parts: list[MicroBatch]) -> None:
        self.engine.forget()
        self.gradients.take()
        guards.free_memory(self.world.device)
        if not self.world.max([float(max(len(part.places) for part in parts) > 1)])[0]:
            raise guards.too_large(failure or "on another rank", self.cfg.train.zero)
        self.pieces *= 2
        self.warn(
            f"out of memory at step {self.step}: micro batches are cut into {self.pieces} from "
            "here on, which changes no gradient; train.max_tokens_per_batch bounds them from the "
            "start"
        )

    def _not_finite(self, parts: list[MicroBatch], done: list[tuple]) -> str | None:
        """Which loss or gradient of this rank is not finite, with the rows that it came from."""
        if not done:
            return None
        losses, flags = torch.stack([d[0] for d in done]), torch.stack([d[2] for d in done])
        if bool(losses.isfinite().all() & ~flags.any()):
            return None
        for n, (part, (loss, sums, flag)) in enumerate(zip(parts, done, strict=True)):
            of = f"micro batch {n + 1} of {len(parts)}"
            place = f"step {self.step}, {of}, rank {self.world.rank}"
            if not loss.isfinite():
                rows = (~sums[..., 0].isfinite().all(1)).nonzero()[:, 0].tolist()
                return guards.not_finite(f"loss is {float(loss)}", place, self._named(part, rows))
            if flag.any():
                what = f"gradient of {guards.listed(self.gradients.names_of(flag))} is not finite"
                return guards.not_finite(what, place, self._named(part))
        return None

    def _named(self, batch: MicroBatch, rows: list[int] | None = None) -> str:
        """Row numbers of the data set, with the file and line of each."""
        places = [batch.places[n] for n in rows] if rows else batch.places
        return guards.listed(f"{row} ({self.steps.where((epoch, row))})" for epoch, row in places)
