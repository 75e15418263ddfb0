"""A linear layer whose outputs are each summed over k in one fixed order, in float32, whatever the
number of rows: a row has the same bits alone and among others.

M rows, K inputs, N outputs. The order is the machine's (linear_cpu.cpp): chains of multiply-adds in
the lanes of a vector, or for bf16 rows by bf16 weights what AMX or AVX512-BF16 have.

Weights may be `quantized`: in int8, a scale for each group of 64 inputs, uint8 [N, 68 * groups].
Rows are rounded likewise then, each by itself, so that products are those of whole numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import fast

GROUP = 64  # inputs that share a scale
TINY = 1e-30  # below, 127 over it may overflow


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """x [..., K], weight [N, K] or quantized, bias [N] -> [..., N] of x's dtype: one chain over
    k."""
    K, rows = x.shape[-1], x.float()
    if weight.dtype == torch.uint8:
        rows, weight = dequantize(quantize(rows), K), dequantize(weight, K)
    out = x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
    for column, weights in zip(rows.unbind(-1), weight.float().unbind(1), strict=True):
        out = out + column[..., None] * weights
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """x [..., K], weight [N, K] and bias [N] or None, each float32, bf16 or fp16, the weight also
    quantized -> [..., N] of x's dtype. No gradients."""
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


def quantize(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> uint8 [..., 68 * groups]: of each 64 numbers what they are in int8, and the
    float32 by which these are multiplied; the largest is 127 or -127. The last group is filled with
    zeros."""
    x = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = x.abs().amax(-1, keepdim=True)
    # a number over a tensor is a product with its reciprocal, rounded twice
    inverse = torch.where(largest > TINY, largest.new_tensor(127) / largest, 0)
    values = (x * inverse).round().to(torch.int8)
    return torch.cat([values.view(torch.uint8), (largest / 127).view(torch.uint8)], -1).flatten(-2)


def dequantize(quantized: torch.Tensor, K: int) -> torch.Tensor:
    """What `quantize` made -> float32 [..., K]."""
    parts = quantized.unflatten(-1, (-1, GROUP + 4))
    values, scale = parts[..., :GROUP].view(torch.int8), parts[..., GROUP:].contiguous()
    return (values * scale.view(torch.float32)).flatten(-2)[..., :K]
