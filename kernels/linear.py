"""A linear layer whose outputs are each summed over k in one fixed order, in float32, whatever the
number of rows: a row has the same bits alone and among others.

M rows, K inputs, N outputs. The order is the machine's (linear_cpu.cpp): chains of multiply-adds in
the lanes of a vector, or for bf16 rows by bf16 weights what AMX or AVX512-BF16 have."""

from __future__ import annotations

import torch

from kernels.dispatch import fast


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] of x's dtype: one chain over k."""
    out = x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
    for column, weights in zip(x.float().unbind(-1), weight.float().unbind(1), strict=True):
        out = out + column[..., None] * weights
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """x [..., K], weight [N, K] and bias [N] or None, each float32, bf16 or fp16 -> [..., N] of x's
    dtype. No gradients."""
    if not fast(x):
        return linear_reference(x, weight, bias)
    return torch.ops.eagle_cpu.linear(x, weight.contiguous(), bias)


def lean(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight in bf16, where bf16 holds it exactly: half the bytes to read. Else itself."""
    if weight.dtype == torch.float32:
        half = weight.to(torch.bfloat16)
        if torch.equal(half.float(), weight):
            return half
    return weight.contiguous()
