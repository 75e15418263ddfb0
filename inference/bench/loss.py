"""What the fused draft loss saves: forward and backward, in tiles against all logits at once.

S unrolled steps, U positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from inference.bench.timing import peak_bytes, race
from kernels.draft_loss import Objective, draft_loss, draft_loss_reference


def losses(
    steps: int, positions: int, hidden: int, vocab: int, repeats: int, device: torch.device
) -> list[dict]:
    """A row an implementation: milliseconds and peak bytes above what the inputs hold."""
    run = problem(steps, positions, hidden, vocab, device)
    works = {"fused": draft_loss, "naive": draft_loss_reference}
    works = {name: functools.partial(run, loss) for name, loss in works.items()}
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}
    seconds, _ = race(works, repeats, device)
    sizes = {"steps": steps, "positions": positions, "hidden": hidden, "vocab": vocab}
    rows = []
    for which, spent in seconds.items():
        found = {"ms": 1e3 * statistics.median(spent), "peak_bytes": peaks[which]}
        rows.append({"kind": "draft_loss", "which": which, **sizes, **found})
    return rows


def problem(S: int, U: int, H: int, V: int, device: torch.device) -> Callable[[Callable], None]:
    """run(loss): soft cross-entropy against a teacher, with gradients of the hidden states and of
    the projection.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device)

    hidden = normal(S, U, H).to(dtype).requires_grad_()
    weight = normal(V, H).mul_(H**-0.5).requires_grad_()
    states, rows = normal(U, H).to(dtype), normal(V, H).mul_(H**-0.5).to(dtype)
    importance = torch.full((S, U), 1 / (S * U), device=device)

    def teacher(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = states[start:stop] @ rows.T
        return logits, logits.argmax(-1)

    def run(loss: Callable) -> None:
        loss(hidden, weight, teacher, importance, Objective()).total.backward()
        hidden.grad = weight.grad = None

    return run
