"""Builds the C++ files beside it with the machine's compiler, once, and loads them.

Once `loaded`, attention, linear layers and the functions of grow_tree.py run compiled on CPU
tensors."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

NAMES = "tree_attention", "grow_tree", "linear"
SOURCES = [Path(__file__).with_name(f"{name}_cpu.cpp") for name in NAMES]
HEADER = Path(__file__).with_name("vectors.h")
# without -fopenmp, at::parallel_for is serial; torch brings the library, none is linked here
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp"]
loaded = False


def load(folder: Path) -> None:
    """`build` it, and use it from now on."""
    global loaded
    if not loaded:
        torch.ops.load_library(str(build(folder)))
        loaded = True


def cpu_flags() -> str:
    """What names the processor, as the code is made for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def build(folder: Path) -> Path:
    """Build the library into `folder` unless it is there.

    Needs g++ (or clang++) and ninja; raises what torch's extension loader raises."""
    from torch.utils.cpp_extension import is_ninja_available
    from torch.utils.cpp_extension import load as make

    facts = repr(
        ([s.read_text() for s in (*SOURCES, HEADER)], FLAGS, torch.__version__, cpu_flags())
    )
    name = "eagle_cpu_" + hashlib.sha256(facts.encode()).hexdigest()[:16]

    def compile(scratch: Path) -> Path:
        if not (shutil.which(os.environ.get("CXX", "g++")) and is_ninja_available()):
            raise FileNotFoundError("no C++ compiler (g++), or no ninja")
        logging.getLogger(__name__).warning("compiling the CPU's kernels, once on this machine")
        make(
            name,
            list(map(str, SOURCES)),
            extra_cflags=FLAGS,
            build_directory=str(scratch),
            is_python_module=False,
        )
        return scratch / f"{name}.so"

    return keep(folder / f"{name}.so", compile)


def keep(path: Path, make: Callable[[Path], Path]) -> Path:
    """`path` with a hash of its bytes in its name: from the disk where it is whole, else as
    `make(scratch)` made it.

    A truncated or foreign file does not have the hash, and is made anew. Several processes may make
    one at once, each in a folder of its own (a build that was killed leaves a lock there, on which
    torch's loader waits for ever); what has its name is whole."""

    def named(file: Path) -> Path:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return path.with_name(f"{path.stem}-{digest.hexdigest()}{path.suffix}")

    for file in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
        if file == named(file):
            return file
        file.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as scratch:
        made = make(Path(scratch))
        final = named(made)
        os.replace(made, final)
    return final
