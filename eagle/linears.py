"""The row-invariant linear in the place of a model's `nn.Linear` layers, for a pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kernels.linear import Packed

FLOATS = torch.float32, torch.bfloat16, torch.float16
_packed: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()
_turn = threading.RLock()  # layers are lent to one pass at a time


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Those that can be lent: on a CPU, neither a subclass nor with a forward of their own."""
    return [
        m
        for m in dict.fromkeys(modules)
        if type(m) is nn.Linear
        and "forward" not in vars(m)
        and m.weight.dtype in FLOATS
        and m.weight.device.type == "cpu"
    ]


@contextmanager
def lent(linears: list[nn.Linear], forwards: Iterable[Callable]) -> Iterator[None]:
    """Each layer computes with the forward given, hooks and all; afterwards with its own."""
    with _turn:
        try:
            for linear, forward in zip(linears, forwards, strict=True):
                vars(linear)["forward"] = forward
            yield
        finally:
            for linear in linears:
                vars(linear).pop("forward", None)


def pack(linear: nn.Linear) -> Packed:
    """The layer's weights in panels, a second copy of them, made once."""
    found = _packed.get(linear)
    if found is None or not found.holds(linear.weight, linear.bias):
        found = _packed[linear] = Packed(linear.weight, linear.bias)
    return found


def table(linears: list[nn.Linear]):
    """What `torch.ops.eagle_cpu.lend` takes: the weights, by number."""
    packed = [pack(linear) for linear in linears]
    return torch.classes.eagle_cpu.Linears([p.panels for p in packed], [p.bias for p in packed])
