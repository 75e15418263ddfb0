"""Builds tree_attention_cpu.cpp with the machine's C++ compiler, once, and loads it.

Once loaded, `torch.ops.eagle.attend` on CPU tensors runs the compiled kernel; see the C++ file's text.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("tree_attention_cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++20"]
_loaded = False


def load(folder: Path, machine: str) -> None:
    """Build into `folder` unless it is there. machine: what names the processor, as the code is made for it.

    Needs g++ (or clang++) and ninja; raises what torch's extension loader raises.
    """
    global _loaded
    if _loaded:
        return
    from torch.utils.cpp_extension import load as build

    facts = repr((SOURCE.read_text(), FLAGS, torch.__version__, machine))
    name = "eagle_cpu_" + hashlib.sha256(facts.encode()).hexdigest()[:16]
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    build(
        name, [str(SOURCE)], extra_cflags=FLAGS, build_directory=str(path), is_python_module=False
    )
    _loaded = True
