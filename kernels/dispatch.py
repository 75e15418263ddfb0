"""Which implementation runs: a Triton kernel, compiled C++, or the plain-PyTorch reference that
specifies both."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from kernels import cpu_extension


def use_triton(tensor: torch.Tensor) -> bool:
    """Triton for CUDA tensors where triton can be imported; the reference everywhere else.

    EAGLE_TRITON=0 asks for the reference on CUDA too. On a CPU, EAGLE_TRITON=1 together with
    TRITON_INTERPRET=1 (both set before triton is first imported) runs the kernels in Triton's
    interpreter, which is for tests: it is far slower than the reference."""
    wish = os.environ.get("EAGLE_TRITON")
    if tensor.is_cuda:
        return wish != "0" and _importable()
    return wish == "1" and os.environ.get("TRITON_INTERPRET") == "1" and _importable()


@functools.cache
def _importable() -> bool:
    return importlib.util.find_spec("triton") is not None


def fast(tensor: torch.Tensor) -> bool:
    """Whether the C++ of `cpu_extension` takes it."""
    return cpu_extension.loaded and tensor.device.type == "cpu" and not use_triton(tensor)


def dispatched(reference: Callable, module: str, kernel: str, cpp: str | None = None) -> Callable:
    """The operation that `reference` specifies, as its first argument, a tensor, decides: `kernel`
    of the Triton `module`, torch.ops.eagle_cpu's `cpp`, or the reference, all of one signature."""

    @functools.wraps(reference)
    def operation(tensor, *args, **options):
        implementation = reference
        if use_triton(tensor):
            implementation = getattr(importlib.import_module(f"kernels.{module}"), kernel)
        elif cpp is not None and fast(tensor):
            implementation = getattr(torch.ops.eagle_cpu, cpp)
        return implementation(tensor, *args, **options)

    return operation
