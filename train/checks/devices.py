"""Accelerators, attention back ends, Triton and the C++ compiler. Knows no models or data."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from eagle.loading import fast_bf16
from kernels.cpu_extension import FLAGS
from train.checks.findings import Finding, note, ok, problem, size, warning

# generation of flash-attention -> (distributions, module, least compute capability)
FLASH = {
    "2": (("flash-attn",), "flash_attn", (8, 0)),
    "3": (("flash-attn-3", "flash-attn-hopper"), "flash_attn_interface", (9, 0)),
    "4": (("flash-attn-4",), "flash_attn.cute", (9, 0)),
}


def accelerators() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if torch.version.cuda is None and torch.version.hip is None and _nvidia_driver():
            yield warning(
                "accelerator",
                "this machine has an NVIDIA driver, and PyTorch is a CPU build",
                "install a CUDA build of torch (see pytorch.org)",
            )
        elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            yield note(
                "accelerator",
                "CUDA_VISIBLE_DEVICES is empty: GPUs are hidden",
                "unset it to use them",
            )
        else:
            yield note(
                "accelerator",
                f"no GPU: everything runs on {cores} CPU cores",
                "enough for the embedded model and tests; use a GPU for targets above a billion parameters",
            )
        if fast_bf16(torch.device("cpu")):
            yield ok("bf16", "this CPU multiplies bf16 natively")
        else:
            yield note(
                "bf16",
                "this CPU emulates bf16, slowly",
                "leave dtypes as they are by default, or set train.dtype=fp32, in fine-tuning model.compute=fp32, in "
                "generation --dtype float32",
            )
        return
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        major, minor = facts.major, facts.minor
        text = f"cuda:{index} {facts.name}, sm_{major}{minor}, {size(free)} of {size(total)} free"
        if not any(
            arch.endswith(f"_{major}{minor}") or _same_major(arch, major, minor) for arch in built
        ):
            yield problem(
                "accelerator",
                f"{text}: this torch has no code for it ({', '.join(built)})",
                "install a torch build whose CUDA supports this GPU",
            )
        elif free < 0.5 * total:
            yield warning(
                "accelerator",
                f"{text}: other processes hold the rest",
                "see nvidia-smi, or choose another GPU with CUDA_VISIBLE_DEVICES",
            )
        else:
            yield ok("accelerator", text)
        if major < 8 and torch.version.hip is None:
            yield note(
                "bf16",
                f"cuda:{index} has no bf16 tensor cores",
                "set model.dtype=float16 train.dtype=fp32",
            )


def _same_major(arch: str, major: int, minor: int) -> bool:
    """Code for sm_80 runs on sm_86: same major, not newer. ROCm's names are taken as they are."""
    digits = arch.rpartition("_")[2].rstrip("af")  # sm_90a
    if not digits.isdigit():
        return torch.version.hip is not None
    return int(digits[:-1]) == major and int(digits[-1]) <= minor


def _nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def attention() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    working = sdpa_kinds(device)
    if working:
        yield ok("sdpa", f"PyTorch's attention on {device.type}: {', '.join(working)}")
    else:
        yield problem("sdpa", f"no attention of PyTorch runs on {device.type}", "reinstall torch")
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    fitting = []
    for generation, (distributions, module, least) in FLASH.items():
        fits = capability is not None and capability >= least
        version = next((v for d in distributions if (v := _version(d))), None)
        if version is None:
            fitting += [generation] if fits else []
            continue
        reason = _import_error(module)
        if reason:
            yield warning(
                "flash-attn",
                f"flash-attention {generation} ({version}) cannot be imported: {reason}",
                "reinstall it for this torch, or uninstall it",
            )
        elif not fits:
            where = "a CPU" if capability is None else f"sm_{capability[0]}{capability[1]}"
            yield note(
                "flash-attn",
                f"flash-attention {generation} ({version}) does not run on {where}",
                "nothing to do: PyTorch's attention is used",
            )
        else:
            yield ok("flash-attn", f"flash-attention {generation} ({version}) can be imported")
    if capability is None and not any(_version(d) for ds, _, _ in FLASH.values() for d in ds):
        yield ok("flash-attn", "flash-attention is not installed; a CPU does not use it")
    elif fitting and not any(_version(d) for g in fitting for d in FLASH[g][0]):
        yield note(
            "flash-attn",
            f"flash-attention {' or '.join(fitting)} would run here and is not installed",
            "optional: pip install 'eagle-heads[flash]'; else PyTorch's attention is used",
        )


def sdpa_kinds(device: torch.device) -> list[str]:
    """Kinds of `scaled_dot_product_attention` that run a small causal case in the dtype they
    want.
    """
    import warnings

    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    q = torch.randn(1, 2, 16, 64, device=device, dtype=torch.bfloat16)
    working = []
    for name, kind in kinds.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(kind):
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            working.append(name)
        except RuntimeError:  # "No available kernel": this kind does not exist here
            continue
    return working


def triton() -> Iterator[Finding]:
    version = _version("triton")
    if version is None:
        if torch.cuda.is_available():
            yield warning(
                "triton",
                "triton is not installed: the GPU runs plain-PyTorch kernels, slowly",
                "pip install triton",
            )
        else:
            yield ok("triton", "triton is not installed; a CPU does not need it")
        return
    reason = _import_error("triton")
    if reason:
        yield (warning if torch.cuda.is_available() else note)(
            "triton",
            f"triton {version} cannot be imported: {reason}",
            "pip install --force-reinstall triton",
        )
    elif not torch.cuda.is_available():
        yield ok("triton", f"triton {version}; used on a GPU, here the references run")
    elif os.environ.get("EAGLE_TRITON") == "0":
        yield note("triton", "EAGLE_TRITON=0: our Triton kernels are off", "unset it")
    else:
        yield from _run_kernel(version)


def _run_kernel(version: str) -> Iterator[Finding]:
    """Compile and run the smallest of our kernels, against its reference."""
    from kernels.commit_kv import commit_kv, commit_kv_reference

    buffer = torch.randn(1, 2, 1, 1, 8, 16, device="cuda")
    expected = buffer.clone()
    lengths, counts = torch.tensor([2], device="cuda"), torch.tensor([2], device="cuda")
    path = torch.tensor([[1, 3]], device="cuda")
    try:
        commit_kv(buffer, lengths, path, counts)
    except Exception as error:  # a compiler's, a driver's or a linker's
        reason = " ".join(str(error).split())[:200]
        yield problem(
            "triton",
            f"triton {version} cannot compile our kernels: {reason}",
            "install gcc and the Python headers, or set EAGLE_TRITON=0 for the slower references",
        )
        return
    commit_kv_reference(expected, lengths, path, counts)
    if torch.equal(buffer, expected):
        yield ok(
            "triton", f"triton {version} compiles our kernels, and they agree with their references"
        )
    else:
        yield problem(
            "triton",
            f"a kernel compiled by triton {version} is wrong",
            "set EAGLE_TRITON=0, and report this GPU and version",
        )


def compiler() -> Iterator[Finding]:
    """What compile="max" (the C++ kernels, kernels/cpu_extension.py) and torch.compile need on a
    CPU.
    """
    from torch.utils.cpp_extension import is_ninja_available

    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    remedy = (
        "install g++ (Debian: apt-get install g++); without it compile='max' and train.compile are not "
        "there"
    )
    if path is None:
        yield warning("c++", f"no C++ compiler ({name})", remedy)
    else:
        done = subprocess.run(
            [path, *FLAGS, "-x", "c++", "-fsyntax-only", "-"],
            input="#include <vector>\n#include <bit>\nint main() {}\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0][:200]
            yield warning(
                "c++",
                f"{name} cannot compile C++20 for this machine: {reason}",
                "install g++ 11 or newer with its standard library",
            )
        else:
            yield ok("c++", f"{name} compiles C++20 with {' '.join(FLAGS)}")
    if not is_ninja_available():
        yield warning(
            "c++",
            "ninja does not run: C++ kernels cannot be built",
            "pip install ninja, and put it on PATH",
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported; None when it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # binary extensions raise ImportError, OSError, RuntimeError …
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None
