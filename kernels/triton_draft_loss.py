"""The losses of one tile of draft logits, and their gradient in the logits' place: Triton.

    p = softmax(t)   q = softmax(x)   alpha = sum min(p, q)

    loss               d loss / d x
    soft_ce, kl        q - p                          (p smoothed)
    reverse_kl         q * (log(q / p) - loss)
    overlap            -(q * c - q * sum q c) / alpha      c = 1 where q < p, 1/2 where q = p
    total_variation    -(q * c - q * sum q c)

A program does one row in three sweeps over the vocabulary: the two maxima and sums of exponentials,
online (Milakov and Gimelshein 2018); the sums that the loss needs; the gradient, written over the
logits. The specification is `kernels.tile_loss.tile_loss_reference`.

S steps, R positions, D draft vocabulary. Row s * R + r of the logits goes with row r of the
target's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.tile_loss import LEAST, Objective

BLOCK = 4096


@triton.jit
def _online(top, total, x):
    """Take x in: total = sum exp(x - top) so far, lane by lane."""
    higher = tl.maximum(top, x)
    # a lane that has seen nothing stays at -inf and 0: no inf - inf
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - base) + tl.exp(x - base)


@triton.jit
def _log_sum(top, total):
    """Lanes of `_online` -> log of the sum of all exponentials."""
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def _row(
    logits,
    teacher,
    importance,
    loss_out,
    overlap_out,
    best_out,
    R,
    D,
    logits_row,
    teacher_row,
    gamma,
    scale,
    smoothing,
    least,
    LOSS: tl.constexpr,
    FOCAL: tl.constexpr,
    INNER: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S * R)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_row
    teacher += (row % R).to(tl.int64) * teacher_row
    lane = tl.arange(0, BLOCK)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    top_t, total_t = top, total
    token = lane
    for block in range(0, D, BLOCK):
        here = block + lane
        x = tl.load(logits + here, mask=here < D, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + here, mask=here < D, other=float("-inf")).to(tl.float32)
        token = tl.where(x > top, here, token)
        top, total = _online(top, total, x)
        top_t, total_t = _online(top_t, total_t, t)
    highest = tl.max(top, axis=0)
    best = tl.min(tl.where(top == highest, token, 2147483647), axis=0)
    tl.store(best_out + row, tl.minimum(best, D - 1).to(tl.int64))
    log_q, log_p = _log_sum(top, total), _log_sum(top_t, total_t)

    both = tl.zeros((BLOCK,), tl.float32)  # min(p, q)
    product = tl.zeros((BLOCK,), tl.float32)  # p q
    cost = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)  # q c
    for block in range(0, D, BLOCK):
        here = block + lane
        x = tl.load(logits + here, mask=here < D, other=float("-inf")).to(tl.float32) - log_q
        t = tl.load(teacher + here, mask=here < D, other=float("-inf")).to(tl.float32) - log_p
        p, q = tl.exp(t), tl.exp(x)
        both += tl.minimum(p, q)
        if INNER == "target_prob":
            product += p * q
        if (LOSS == "soft_ce") | (LOSS == "kl"):
            taught = tl.where(here < D, (1.0 - smoothing) * p + smoothing / D, 0.0)
            seen = tl.where(taught > 0.0, x, 0.0)
            if LOSS == "kl":
                seen -= tl.where(taught > 0.0, tl.log(taught), 0.0)
            cost -= taught * seen
        elif LOSS == "reverse_kl":
            cost += tl.where(here < D, q * (x - t), 0.0)
        else:
            share += q * tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))
    alpha = tl.sum(both, axis=0)
    if LOSS == "total_variation":
        loss = 1.0 - alpha
    elif LOSS == "overlap":
        loss = -tl.log(tl.maximum(alpha, least))
    else:
        loss = tl.sum(cost, axis=0)
    mean = loss
    shares = tl.sum(share, axis=0)

    weight = tl.load(importance + row)
    if FOCAL:
        inner = alpha
        if INNER == "target_prob":
            inner = tl.sum(product, axis=0)
        far = tl.minimum(tl.maximum(1.0 - inner, 0.0), 1.0)
        # 0^0 = 1, and log 0 is not asked for
        power = tl.exp(gamma * tl.log(tl.where(far > 0.0, far, 1.0)))
        focal = scale * tl.where((far > 0.0) | (gamma == 0.0), power, 0.0)
        loss *= focal
        weight *= focal
    tl.store(loss_out + row, loss)
    tl.store(overlap_out + row, alpha)

    if GRAD:
        if LOSS == "overlap":
            weight = tl.where(alpha >= least, weight / tl.maximum(alpha, least), 0.0)
        for block in range(0, D, BLOCK):
            here = block + lane
            x = tl.load(logits + here, mask=here < D, other=float("-inf")).to(tl.float32) - log_q
            t = tl.load(teacher + here, mask=here < D, other=float("-inf")).to(tl.float32) - log_p
            p, q = tl.exp(t), tl.exp(x)
            if (LOSS == "soft_ce") | (LOSS == "kl"):
                slope = q - ((1.0 - smoothing) * p + smoothing / D)
            elif LOSS == "reverse_kl":
                slope = q * (x - t - mean)
            else:
                slope = q * (shares - tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0)))
            tl.store(logits + here, (weight * slope).to(logits.dtype.element_ty), mask=here < D)


def tile_loss_triton(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    importance: torch.Tensor,
    objective: Objective,
    grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`kernels.draft_loss.tile_loss`; the gradient is written over `logits`."""
    S, R, D = logits.shape
    assert teacher_logits.shape == (R, D) and importance.shape == (S, R) and logits.is_contiguous()
    assert importance.dtype == torch.float32
    if teacher_logits.stride(1) != 1:
        teacher_logits = teacher_logits.contiguous()
    loss = torch.empty(S, R, dtype=torch.float32, device=logits.device)
    overlap = torch.empty_like(loss)
    best = torch.empty(S, R, dtype=torch.int64, device=logits.device)
    focal = objective.gamma is not None
    if S * R:
        _row[(S * R,)](
            logits,
            teacher_logits,
            importance.contiguous(),
            loss,
            overlap,
            best,
            R,
            D,
            D,
            teacher_logits.stride(0),
            objective.gamma if focal else 0.0,
            objective.scale,
            objective.smoothing,
            LEAST,
            LOSS=objective.loss,
            FOCAL=focal,
            INNER=objective.inner,
            GRAD=grad,
            BLOCK=min(BLOCK, triton.next_power_of_2(D)),
            num_warps=8,
        )
    return loss, overlap, best, logits if grad else None
