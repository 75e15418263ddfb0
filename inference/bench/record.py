"""What every subject of the bench leaves: where it was measured, without saying on whose machine;
what was asked; a row a measurement. One JSON object, one table for the terminal, one page."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from inference.bench.report import Section, markdown, terminal
from inference.bench.timing import say
from inference.generate import require_writable

# the person's own files, or where results went: they do not reproduce anything
UNREPORTED = ("json", "report", "out")
CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).parents[2]
# the instruction sets that decide how fast a matrix product is (x86, then ARM)
ISA = (
    "avx2 avx_vnni avx512f avx512_bf16 avx512_fp16 avx512_vnni amx_tile amx_bf16 amx_int8 "
    "asimd bf16 i8mm sve sve2"
).split()
PACKAGES = ("torch", "transformers", "triton", "numpy")


class Record:
    """runs: one row a measurement. settings: what was asked. command: what to type for the same.
    device: where it is measured. file: what keeps the record after each `attempt`."""

    def __init__(self, subject: str, function: Callable, asked: dict, *counts: str) -> None:
        """asked: the arguments of `function`. Refuses, before the work is done, `counts` below 1
        and files that could not be written."""
        require(asked, *counts)
        self.asked, self.command = asked, command_line(subject, function, asked)
        self.settings = {
            name: portable(value) if isinstance(value, str) else value
            for name, value in asked.items()
            if name not in (*UNREPORTED, "device")  # the record has the one that was found
        }
        self.runs: list[dict] = []
        self.file, self.device = None, torch.device("cpu")
        self.load, self.started = load(), time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    def result(self, **summary) -> dict:
        """The JSON object; summary: what follows from the rows."""
        where = {**describe(self.device), "load_start": self.load, "load_end": load()}
        return {
            "device": where["accelerator"] or where["cpu"],
            "threads": where["threads"],
            "versions": where["versions"],
            "environment": where,
            **self.settings,
            "runs": self.runs,
            **summary,
            "command": self.command,
        }

    def attempt(self, kind: str, settings: dict, work: Callable) -> dict:
        """Add a row: the fields that `work()` returns, or its error; and keep the record so far."""
        row, started = {"kind": kind, **settings}, self.spent
        try:
            row |= work()
        except Exception as error:  # it says so, and the others go on
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        row["seconds"] = round(self.spent - started, 3)
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a device that an error has ended
                torch.cuda.empty_cache()
        self.runs.append(row)
        told = " ".join(f"{name}={value}" for name, value in settings.items())
        say(f"[{self.spent:6.1f} s] {kind} {told} {row.get('error', '')}")
        atomic_write_text(self.file, json.dumps(self.result(), indent=1) + "\n")
        return row

    def hand_over(self, result: dict, title: str, sections: list[Section]) -> None:
        """Print the first section and, as the last line, the JSON; keep what was asked for."""
        print(terminal(title, sections[0]))
        line, page = json.dumps(result), markdown(title, result, sections)
        for name, text in (("json", line + "\n"), ("report", page)):
            if self.asked.get(name) is not None:
                atomic_write_text(self.asked[name], text)
        print(line)


def require(asked: dict, *counts: str) -> None:
    for name in counts:
        if asked[name] < 1:
            raise EagleError(f"{name} must be at least 1, not {asked[name]}")
    for name in ("json", "report"):
        if asked.get(name) is not None:
            require_writable(Path(asked[name]))


def command_line(subject: str, function: Callable, asked: dict) -> str:
    """What to type for the same. Of a path on this machine only the last part is told."""
    threads = os.environ.get("OMP_NUM_THREADS")
    words = [f"OMP_NUM_THREADS={threads}"] if threads else []
    words += ["python", "-m", "inference.bench", *([subject] if subject else [])]
    for name, default in function.__kwdefaults__.items():
        if asked.get(name, default) != default and name not in UNREPORTED:
            words += [f"--{name}", portable(str(asked[name]))]
    return shlex.join([*words, *asked.get("overrides", ())])


def portable(text: str) -> str:
    """Of a path that leads out of the working folder, its last part; anything else as it is."""
    outside = Path(text).is_absolute() or ".." in Path(text).parts or text.startswith("~")
    return Path(text).name if outside else text


def load() -> list[float]:
    """Averages over 1, 5 and 15 minutes: on a shared machine the reader needs them."""
    return [round(x, 2) for x in os.getloadavg()]


@functools.cache
def describe(device: torch.device) -> dict:
    """The JSON's `environment`, without the load: no host names, user names or paths."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    cpu = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    # on Linux; fewer in a container
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    gpu = {"accelerator": None}
    if device.type == "cuda":
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        gpu = {"accelerator": torch.cuda.get_device_name(device), "driver": driver}
        gpu["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "isa": [name for name in ISA if name in flags],
        "threads": torch.get_num_threads(),
        **gpu,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **found},
        "git_commit": said("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def said(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    options = {"cwd": ROOT, "text": True, "timeout": 30, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, **options).split("\n")[0].strip() or None
