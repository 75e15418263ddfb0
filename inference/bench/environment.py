"""Where a measurement was made, without saying on whose machine: no host names, user names or
paths.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).parents[2]
# the instruction sets that decide how fast a matrix product is (x86, then ARM)
ISA = (
    "avx2 avx_vnni avx512f avx512_bf16 avx512_fp16 avx512_vnni amx_tile amx_bf16 amx_int8 "
    "asimd bf16 i8mm sve sve2"
).split()
PACKAGES = ("torch", "transformers", "triton", "numpy")


def describe(device: torch.device) -> dict:
    """The JSON's `environment`, but for the load at the end, which only the end knows."""
    cuda = device.type == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    flags = (cpu_field("flags", "Features") or "").split()
    pinned = hasattr(os, "sched_getaffinity")  # fewer cores there, or in a container
    return {
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if pinned else os.cpu_count(),
        "isa": [name for name in ISA if name in flags],
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "driver": said(*driver) if cuda else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_commit": said("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_start": load(),
    }


def version(package: str) -> str | None:
    """None for what is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_field(*names: str) -> str | None:
    """The first line of /proc/cpuinfo that is called one of `names`."""
    try:
        lines = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:
        return None
    return next((value.strip() for key, _, value in lines if key.strip() in names), None)


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes: on a shared machine the reader needs them."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def said(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 30, "check": True}
    try:
        return subprocess.run(command, **options).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
