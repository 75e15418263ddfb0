"""Lossless speculative decoding with EAGLE draft heads.

>>> from eagle import EaModel
>>> model = EaModel.from_pretrained()            # the embedded model and its head
>>> ids = model.eagenerate(model.tokenizer("def add(a, b):").input_ids, max_new_tokens=32)"""

import importlib
from pathlib import Path

import kernels as _kernels

# `kernels/` is a namespace portion: where Hugging Face's package of that name is installed, it wins
# the import, and our folder is appended to its search path instead.
_ours = str(Path(__file__).resolve().parent.parent / "kernels")
if _ours not in map(str, _kernels.__path__):
    _kernels.__path__.append(_ours)

__version__ = "0.1.0"
_WHERE = {
    "EaModel": "model",
    "EagleError": "errors",
    "SamplingParams": "sampling",
    "TreeShape": "tree",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str):
    """Import torch and transformers only when something that needs them is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'eagle' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
