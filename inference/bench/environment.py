"""Where a measurement was made, without saying on whose machine: no host names, user names or
paths.
"""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).parents[2]
# the instruction sets that decide how fast a matrix product is (x86, then ARM)
ISA = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)
PACKAGES = ("torch", "transformers", "triton", "numpy")


def describe(device) -> dict:
    """The JSON's `environment`, but for the load at the end, which only the end knows."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "isa": isa_flags(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.system(),
        "versions": versions(),
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_start": load(),
    }


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_field(*names: str) -> str | None:
    """The first line of /proc/cpuinfo that is called one of `names`."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return None


def cpu_name() -> str:
    return cpu_field("model name") or platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    flags = set((cpu_field("flags", "Features") or "").split())
    return [name for name in ISA if name in flags]


def usable_cores() -> int | None:
    """Fewer than there are where the process is pinned or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes: on a shared machine the reader needs them."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def git_commit(root: Path = ROOT) -> str | None:
    """The checked-out commit, read from the files so that git need not be installed."""
    git = root / ".git"
    try:
        if git.is_file():  # a worktree: its HEAD is its own, the references are the main checkout's
            git = (root / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = git / "commondir"
        shared = (git / common.read_text().strip()).resolve() if common.exists() else git
        for folder in (git, shared):
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        for line in (shared / "packed-refs").read_text().splitlines():
            commit, _, reference = line.partition(" ")
            if reference == name:
                return commit
    except OSError:
        return None
    return None


class PeakMemory:
    """Bytes needed at the most since `start`.

    On a GPU: what the allocator held at the most, weights included. On a CPU: how far the resident
    set grew over its size at `start`; memory that the process freed earlier and uses again does not
    show.
    """

    def __init__(self, device) -> None:
        self.device = device
        self.before = 0

    def start(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        except OSError:
            pass  # then only growth above the highest mark so far is seen
        self.before = high_water()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return max(high_water() - self.before, 0)


def high_water() -> int:
    """The process's largest resident set, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
