"""What stops a run or warns about it: values that are not finite, a loss that jumps or stands
still, too little data, too little memory, no more progress."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from eagle.errors import EagleError


class GradientWatch:
    """Names the parameters whose gradients are not finite, before they reach the weights.

    A hook on each parameter sees its gradient of every micro-batch, whole also where ZeRO splits
    and frees it afterwards. Nothing waits for the device until the names are asked for.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self._bad = torch.zeros(len(named), dtype=torch.bool, device=device)
        for n, (_, parameter) in enumerate(named):
            parameter.register_hook(partial(self._see, n))

    def _see(self, n: int, grad: torch.Tensor) -> None:
        self._bad[n] |= ~torch.linalg.vector_norm(grad).isfinite()

    def take(self) -> torch.Tensor:
        """[parameters] bool, on the device: which were not finite since the last call."""
        found = self._bad.clone()
        self._bad.zero_()
        return found

    def names_of(self, bad: torch.Tensor) -> list[str]:
        return [name for name, wrong in zip(self.names, bad.tolist(), strict=True) if wrong]


@dataclass
class LossWatch:
    """Warns when the smoothed loss jumps up, and when it has stood still.

    `smooth` is an exponential mean over about 10 steps; `usual` and `spread` are the mean of
    `smooth` and of its distance from it over about 100. All of it is part of a checkpoint.
    """

    steps: int = 0
    smooth: float = 0.0
    usual: float = 0.0
    spread: float = 0.0
    spiking: bool = False
    best: float = float("inf")
    best_step: int = 0

    WARM_UP, SPIKE, PLATEAU, GAIN = 30, 4.0, 300, 0.01

    def see(self, step: int, loss: float) -> list[str]:
        """Take in a step's loss; returns what is to be said about it."""
        self.steps += 1
        self.smooth += (loss - self.smooth) * max(0.1, 1 / self.steps)
        jump = self.smooth - self.usual
        said = []
        if self.steps > self.WARM_UP:
            high = jump > self.SPIKE * self.spread and jump > 0.1 * self.usual
            if high and not self.spiking:
                said.append(
                    f"loss spike at step {step}: {self.smooth:.4g} smoothed, {self.usual:.4g} "
                    "usual; lower train.lr or train.grad_clip if it stays"
                )
            self.spiking = high
        rate = max(0.01, 1 / self.steps)
        self.usual += (self.smooth - self.usual) * rate
        self.spread += (abs(jump) - self.spread) * rate
        if self.smooth < self.best * (1 - self.GAIN) or self.steps <= self.WARM_UP:
            self.best, self.best_step = min(self.smooth, self.best), self.steps
        elif self.steps - self.best_step == self.PLATEAU:
            said.append(
                f"loss plateau at step {step}: no {self.GAIN:.0%} gain on {self.best:.4g} in "
                f"{self.PLATEAU} steps; more data, another train.lr or an earlier end may serve "
                "better"
            )
            self.best_step = self.steps
        return said


def evaluations_without_gain(taus: list[float]) -> int:
    """How many evaluations in a row, up to the last, have not raised the best acceptance length."""
    return len(taus) - 1 - taus.index(max(taus)) if taus else 0


def require_supervised(tokens: int, minimum: int) -> None:
    """Refuse data that cannot teach anything."""
    if tokens < minimum:
        raise EagleError(
            f"the training data supervises {tokens} tokens, fewer than data.min_supervised_tokens="
            f"{minimum}: add data, check what is masked with python -m train.inspect, or lower the "
            "limit"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the allocator of the CPU, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def free_memory(device: torch.device) -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def too_large(failure: str, zero: int) -> EagleError:
    """When a step does not fit and cannot be cut any smaller."""
    remedy = "lower data.max_length or train.ttt_steps, or set train.checkpoint_activations=true"
    if zero >= 2:
        remedy = (
            f"with train.zero={zero} a step cannot be begun again in smaller micro batches: use "
            "train.zero=1 or set train.max_tokens_per_batch"
        )
    return EagleError(f"out of memory ({failure}); {remedy}")


def not_finite(what: str, place: str, rows: str | None = None) -> str:
    """What to say of a value that is not finite; the weights have not taken it in."""
    of = f", rows {rows}" if rows else ""
    return (
        f"the {what} at {place}{of}; lower train.lr, or look at those rows with train.inspect; the "
        "last checkpoint is whole"
    )


def listed(names: Iterable[str], limit: int = 8) -> str:
    """a, b, c and 5 more"""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
