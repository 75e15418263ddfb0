"""Which implementation runs: a Triton kernel, or the plain-PyTorch reference beside it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


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
