"""Builds the C++ files beside it with the machine's compiler, once, and loads them.

Once `loaded`, `torch.ops.eagle.attend` on CPU tensors and the functions of grow_tree.py run compiled.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(f"{name}_cpu.cpp") for name in ("tree_attention", "grow_tree")]
FLAGS = ["-O3", "-march=native", "-std=c++20"]
loaded = False


def load(folder: Path, machine: str) -> None:
    """Build into `folder` unless it is there. machine: what names the processor, as the code is made for it.

    Needs g++ (or clang++) and ninja; raises what torch's extension loader raises.
    """
    global loaded
    if loaded:
        return
    from torch.utils.cpp_extension import load as build

    facts = repr(([s.read_text() for s in SOURCES], FLAGS, torch.__version__, machine))
    name = "eagle_cpu_" + hashlib.sha256(facts.encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if library.exists():
        torch.ops.load_library(str(library))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # a folder of this process's own: torch's loader waits for ever on the lock of a build that was killed
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
            build(
                name, list(map(str, SOURCES)), extra_cflags=FLAGS, build_directory=scratch,
                is_python_module=False,
            )  # fmt: skip
            os.replace(Path(scratch) / library.name, library)
    loaded = True
