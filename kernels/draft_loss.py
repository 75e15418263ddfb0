"""What a draft head is taught: a loss over all positions (`kernels.tile_loss`) without ever holding
all logits.

S unrolled steps, U positions, R positions of a tile, H hidden, D draft vocabulary.

`draft_loss` cuts the positions into tiles. A tile's logits of all steps are one matrix product, its
losses and their gradients are taken from them at once, and what remains of it is added to the
gradients of the hidden states and of the projection: as the sum of the losses is all that is
differentiated, the backward pass only scales them. The target's logits are asked for once a tile
and serve every step. The matrix products are the vendor's; `tile_loss` is what has a Triton twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.dispatch import dispatched
from kernels.tile_loss import Objective, position_loss, tile_loss_reference

tile_loss = dispatched(tile_loss_reference, "triton_draft_loss", "tile_loss_triton")

# (start, stop) -> the target's logits [R, D] over the draft vocabulary and its choice [R] int64: a
# draft id, or -1 where the target's best token is not in the draft vocabulary
Teacher = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

# logits of a tile; a tile has at least ROWS rows, since each is added to a gradient of [D, H]
CPU_TILE, GPU_TILE, ROWS = 2**20, 2**26, 256


@dataclass(frozen=True)
class DraftLoss:
    """total: sum of importance * loss where the target's choice is known; the rest has no gradient.

    loss, overlap [S, U] fp32: of each position, whatever its importance. right [S, U]: the head's
    best token is the target's choice. known [U]: that choice is in the draft vocabulary."""

    total: torch.Tensor
    loss: torch.Tensor
    overlap: torch.Tensor
    right: torch.Tensor
    known: torch.Tensor


def draft_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    importance: torch.Tensor,
    objective: Objective,
) -> DraftLoss:
    """The specification of `draft_loss`: all logits at once, differentiated by autograd."""
    logits = hidden @ weight.to(hidden.dtype).T
    with torch.no_grad():
        teacher_logits, choices = teacher(0, hidden.shape[1])
    loss, overlap = position_loss(teacher_logits, logits, objective)
    known = choices >= 0
    total = torch.where(known, loss * importance, 0.0).sum()
    return DraftLoss(total, loss.detach(), overlap, logits.argmax(-1) == choices, known)


def draft_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    importance: torch.Tensor,
    objective: Objective,
    tile: int | None = None,
) -> DraftLoss:
    """hidden [S, U, H] after the head's final norm, weight [D, H], importance [S, U] fp32 ->
    DraftLoss.

    Products are in hidden's dtype, everything else in fp32. `total` can be differentiated once,
    with respect to hidden and weight. tile: logits held at a time."""
    S, U, H = hidden.shape
    assert weight.shape[1] == H and importance.shape == (S, U)
    if tile is None:
        least = ROWS * weight.shape[0]
        tile = GPU_TILE if hidden.is_cuda else max(CPU_TILE, least)
    rows = max(1, tile // (S * weight.shape[0]))
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return DraftLoss(*_DraftLoss.apply(hidden, weight, teacher, importance, objective, rows, grad))


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, importance, objective, rows, grad):
        S, U, H = hidden.shape
        device, dtype = hidden.device, hidden.dtype
        total = torch.zeros((), device=device)
        loss, overlap = torch.empty(2, S, U, device=device).unbind()
        right = torch.empty(S, U, dtype=torch.bool, device=device)
        known = torch.empty(U, dtype=torch.bool, device=device)
        if grad:
            d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            d_weight = None  # a frozen output layer has no gradient
            if ctx.needs_input_grad[1]:
                d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device)
        with torch.autocast(device.type, enabled=False):
            projection = weight.to(dtype)
            for start in range(0, U, rows):
                part = slice(start, min(start + rows, U))
                R = part.stop - start
                teacher_logits, choices = teacher(start, part.stop)
                known[part] = choices >= 0
                counted = importance[:, part] * known[part]
                flat = hidden[:, part].reshape(S * R, H)
                logits = (flat @ projection.T).view(S, R, -1)
                loss[:, part], overlap[:, part], best, slope = tile_loss(
                    logits, teacher_logits, counted, objective, grad
                )
                right[:, part] = best == choices
                total += torch.where(counted != 0, loss[:, part] * counted, 0.0).sum()
                if grad:
                    slope = slope.view(S * R, -1)
                    d_hidden[:, part] = (slope @ projection).view(S, R, H)
                    if d_weight is not None:
                        d_weight += slope.T @ flat
        ctx.mark_non_differentiable(loss, overlap, right, known)
        if grad and d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.gradients = (d_hidden, d_weight) if grad else None
        return total, loss, overlap, right, known

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, *_):
        assert ctx.gradients is not None, "draft_loss can be differentiated once"
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        d_weight = None if d_weight is None else d_weight.mul_(d_total)
        return d_hidden.mul_(d_total), d_weight, None, None, None, None, None
