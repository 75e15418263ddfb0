"""Forward and backward of one step's rows: what a rank adds to the gradient before it is shared.

B rows of a micro-batch, G sources, S unrolled steps, C columns of `train.head.metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from train.head.distributed import World
from train.head.engine import Engine
from train.head.loader import MicroBatch, Steps
from train.head.metrics import by_source
from train.head.setup import Parts
from train.head.teacher import Teacher, feature_noise, hidden_and_features, with_noise
from train.head.ttt import Plan, plan_unroll
from train.tracking.recorder import Recorder

NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
MOST_NAMED = 8


@dataclass
class Accumulator:
    """Call it with a step's micro-batches, then `engine.update()`."""

    cfg: HeadTrainConfig
    world: World
    parts: Parts
    engine: Engine
    steps: Steps
    seen: Recorder

    def __post_init__(self) -> None:
        self.draft_ids = self.parts.head.draft_token_ids().to(self.world.device)
        self.noise = feature_noise(self.cfg, self.parts.head.config.method)

    def __call__(self, batches: list[MicroBatch], step: int) -> torch.Tensor:
        """Add the gradient of step `step`'s rows -> this rank's sums [G, S, C] for the metrics."""
        with self.seen.phase("data"):
            plans = [self._plan(batch) for batch in batches]
            totals = self.world.sum(torch.stack([plan.counts for plan in plans]).sum(0))
            totals = totals.to(self.world.device, torch.float32)
        losses, sums = [], []
        with failures_told(self.cfg.train.compile):
            for batch, plan in zip(batches, plans, strict=True):
                loss, of_rows = self.forward(batch, plan, totals)
                with self.seen.phase("backward"):
                    self.engine.backward(loss, last=batch is batches[-1])
                losses.append(loss.detach())
                sums.append(of_rows.detach())
        self._require_finite(batches, torch.stack(losses), sums, step)
        count = len(self.parts.data.sources)
        pairs = zip(batches, sums, strict=True)
        return sum(by_source(of_rows, batch.source, count) for batch, of_rows in pairs)

    def _plan(self, batch: MicroBatch) -> Plan:
        real = batch.attention_mask
        mask = real if self.cfg.loss.tokens == "all" else batch.loss_mask
        return plan_unroll(mask, self.cfg.train.ttt_steps, batch.loss_weight, real.sum(1))

    def forward(self, batch: MicroBatch, plan: Plan, totals: torch.Tensor) -> tuple:
        """The batch's share of the global loss, and sums [B, S, C]."""
        device = self.world.device
        with self.seen.phase("target"), torch.no_grad():
            ids = batch.input_ids.to(device, non_blocking=True)
            mask = batch.attention_mask.to(device, non_blocking=True)
            plan = plan.to(device)
            hidden, features = hidden_and_features(self.parts.states, ids, mask)
            features = with_noise(features, mask, self.noise)
            real = batch.input_ids[batch.attention_mask.bool()]  # picked without a wait
            embeds = self.parts.embed(real.to(device, non_blocking=True))
            teacher = Teacher.of(self.parts.target, hidden[plan.sources], self.draft_ids)
            del hidden
        with self.seen.phase("head"):
            return self.engine(features, embeds, plan, teacher, totals)

    def _require_finite(self, batches: list, losses: torch.Tensor, sums: list, step: int) -> None:
        """All ranks stop where the loss of one is not finite, and name the rows of its origin."""
        problem = None
        if not losses.isfinite().all():
            n = int((~losses.isfinite()).nonzero()[0])
            rows = (~sums[n][..., 0].isfinite().all(1)).nonzero()[:, 0].tolist()
            place = f"step {step}, micro batch {n + 1} of {len(batches)}, rank {self.world.rank}"
            place += f", rows {self._named(batches[n], rows)}"
            problem = not_finite(f"loss is {float(losses[n])}", place)
        if self.world.max([float(problem is not None)])[0]:
            raise next(error for error in self.world.gather(problem) if error)

    def _named(self, batch: MicroBatch, rows: list[int] | None = None) -> str:
        """Row numbers of the data set, with the file and line of each."""
        places = [batch.places[n] for n in rows] if rows else batch.places
        named = [f"{row} ({self.steps.where((epoch, row))})" for epoch, row in places[:MOST_NAMED]]
        return ", ".join(named) + (", ..." if len(places) > MOST_NAMED else "")


def not_finite(what: str, place: str) -> EagleError:
    return EagleError(f"the {what} at {place}; lower train.lr; the last checkpoint is whole")


@contextmanager
def failures_told(compiled: bool) -> Iterator[None]:
    """A device without memory and a compiler that fails end the run with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason, of = " ".join(str(error).split())[:300], type(error).__module__
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if full or any(text in reason for text in NO_MEMORY):
            raise EagleError(
                f"out of memory ({reason}); set train.max_tokens_per_batch or "
                "train.checkpoint_activations=true, or lower data.max_length; then --resume"
            ) from error
        if compiled and of.startswith(("torch._dynamo", "torch._inductor")):
            raise EagleError(
                f"train.compile=true: the head's layer could not be compiled ({reason}); install a "
                "C++ compiler (g++) or, for a GPU, triton, or leave train.compile out"
            ) from error
        raise
