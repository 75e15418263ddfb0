"""A linear layer whose outputs are each summed over k in one fixed order, in float32, whatever the
number of rows: a row has the same bits alone and among others.

M rows, K inputs, N outputs. The order is the machine's (linear_cpu.cpp): one chain of multiply-adds
from k = 0 in general; for bf16 rows by bf16 weights what AMX or AVX512-BF16 have."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import fast

WIDTH = 16  # outputs a panel


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] of x's dtype: one chain over k."""
    out = x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
    for column, weights in zip(x.float().unbind(-1), weight.float().unbind(1), strict=True):
        out = out + column[..., None] * weights
    return (out if bias is None else out + bias.float()).to(x.dtype)


class Packed:
    """A layer's weights in panels, a copy: bf16 where bf16 holds them exactly (half the bytes of
    float32, the same result), else float32. weight [N, K], bias [N]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        half = weight.to(torch.bfloat16)
        if torch.equal(half.to(weight.dtype), weight):
            weight = F.pad(half, (0, -self.in_features % 32, 0, -self.out_features % WIDTH))
            panels = weight.view(-1, WIDTH, weight.shape[1] // 2, 2).transpose(1, 2)
        else:
            weight = F.pad(weight.float(), (0, 0, 0, -self.out_features % WIDTH))
            panels = weight.view(-1, WIDTH, self.in_features).transpose(1, 2)
        self.panels = panels.contiguous()
        self.bias = None if bias is None else bias.detach().float().contiguous()

    def holds(self, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether these are the weights still."""
        same = (self.bias is None) == (bias is None) and weight.shape == self.weight.shape
        same = same and (bias is None or torch.equal(self.bias, bias.float()))
        return same and torch.equal(self.weight.to(weight.dtype), weight)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], of the panels' dtype."""
        rows = self.panels.transpose(1, 2).reshape(len(self.panels) * WIDTH, -1)
        return rows[: self.out_features, : self.in_features]


def linear(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [..., K] float32, bf16 or fp16 -> [..., N] of x's dtype."""
    if not fast(x):
        return linear_reference(x, packed.weight, packed.bias)
    return torch.ops.eagle_cpu.linear(x, packed.panels, packed.bias, packed.out_features)
