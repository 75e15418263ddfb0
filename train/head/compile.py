"""torch.compile of the head's layers, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eagle.errors import EagleError
from train.head.attention import UnrolledAttention
from train.head.ttt import UnrolledHead

VARIANTS = 64  # graphs of one function: dtypes, and sizes that were 1


def compile_layer(module: UnrolledHead) -> None:
    """Compile in place, lazily: the first step builds two graphs a pass, before and after
    attention, for all lengths and row counts. Attention works in blocks of each row and stays as it
    is."""

    class Opaque(UnrolledAttention):
        __call__ = torch.compiler.disable(UnrolledAttention.__call__)

    module.attention = Opaque
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in module.head.decoder_layers:
        layer.compile(dynamic=True)
    module._first = torch.compile(module._first, dynamic=True)


@contextmanager
def compile_errors_told(compiled: bool) -> Iterator[None]:
    """A compiler that fails ends the run: going on without it would only look like success."""
    try:
        yield
    except Exception as error:
        known = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not compiled or not known:
            raise
        reason = " ".join(str(error).split())[:300]
        raise EagleError(
            f"train.compile=true: the head's layer could not be compiled ({reason}); install a C++ compiler "
            "(g++) or, for a GPU, triton, or leave train.compile out"
        ) from error
