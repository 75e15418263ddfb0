"""The row-invariant linear in the place of a model's `nn.Linear` layers, for a pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernels import cpu_extension
from kernels.dispatch import fast
from kernels.linear import lean, linear, quantize

TYPES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
_failed: dict[Path, str] = {}
_lean: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


class Int8Linear(nn.Module):
    """A linear layer in int8, `kernels.linear.quantize`: [..., K] -> [..., N] of the rows' dtype.
    weight uint8 [N, 68 * groups]. No gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", quantize(layer.weight.detach()))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def to_int8(model: nn.Module) -> None:
    """Every `nn.Linear` of the model in int8, the output layer too; an embedding that is tied to it
    stays as it is."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, Int8Linear(layer))


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Linear | Int8Linear]:
    """Those that can be lent: on a CPU, neither of another kind nor with a forward of their own."""
    return [
        m
        for m in dict.fromkeys(modules)
        if type(m) in (nn.Linear, Int8Linear)
        and "forward" not in vars(m)
        and m.weight.dtype in TYPES
        and m.weight.device.type == "cpu"
    ]


@contextmanager
def lent(linears: list[nn.Linear], forwards: Iterable[Callable]) -> Iterator[None]:
    """Each layer computes with the forward given, hooks and all; afterwards with its own. One that
    is lent already stays so."""
    mine = []
    try:
        for layer, forward in zip(linears, forwards, strict=True):
            if vars(layer).setdefault("forward", forward) is forward:
                mine.append(layer)
        yield
    finally:
        for layer in mine:
            vars(layer).pop("forward", None)


def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


class Exact:
    """The linear layers of these modules, to be lent to eager passes, where the C++ runs."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.linears = linears_of(modules)
        self.forwards = [partial(forward, layer) for layer in self.linears]

    def lent(self):
        runs = self.linears and fast(self.linears[0].weight)
        return lent(self.linears, self.forwards) if runs else nullcontext()


def load_kernels(folder: Path) -> str | None:
    """The C++ of a CPU, compiled into `folder` where it is not there; the reason where it cannot
    be."""
    if folder not in _failed:
        try:
            return cpu_extension.load(folder)
        except Exception as error:
            _failed[folder] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _failed[folder]


def table(linears: list[nn.Linear]):
    """What `torch.ops.eagle_cpu.lend` takes: the weights, by number. They are the layers' own, but
    for float32 that bf16 holds: a copy of half the bytes, made once."""
    for layer in linears:
        weight = layer.weight.detach()
        found = _lean.get(layer)
        if found is None or not torch.equal(found.to(weight.dtype), weight):
            _lean[layer] = lean(weight)
    biases = [None if m.bias is None else m.bias.detach() for m in linears]
    return torch.classes.eagle_cpu.Linears([_lean[m] for m in linears], biases)
