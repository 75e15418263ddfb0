"""What a stage leaves behind: one JSON file that grows case by case and is whole at every moment.

Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eagle.checkpoint import atomic_write_text
from inference.bench.environment import ROOT, describe

PASS, FAIL, OPEN = "pass", "fail", "not measured"


@dataclass(frozen=True)
class Goal:
    """A bound of the GPU work, and whether it holds. value: None where no case tells."""

    name: str
    bound: str
    value: float | None
    verdict: str

    @classmethod
    def judge(
        cls, name: str, value: float | None, device: torch.device, *, most=None, least=None
    ) -> Goal:
        """A goal is about a GPU: elsewhere the value is kept and nothing is judged."""
        bound = f"<= {most}" if least is None else f">= {least}"
        if value is None or device.type != "cuda":
            return cls(name, bound, value, OPEN)
        held = value <= most if least is None else value >= least
        return cls(name, bound, value, PASS if held else FAIL)


class Record:
    """The cases of one stage. `run` never raises for a case that fails: its error is its result."""

    def __init__(
        self,
        stage: str,
        size: str,
        out: Path,
        device: torch.device,
        budget_s: float,
        revision: str | None = None,
    ) -> None:
        self.path, self.device, self.budget_s = out / f"{stage}.json", device, budget_s
        self.started = time.perf_counter()
        self.lost = False  # the device takes no more work
        environment = describe(device) | {"driver": driver(), "memory_bytes": None}
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            environment["memory_bytes"] = properties.total_memory
        if revision is not None:
            environment["git_commit"] = revision
        self.data: dict = {
            "stage": stage,
            "size": size,
            "device": str(device),
            "environment": environment,
            "budget_s": budget_s,
            "seconds": 0.0,
            "complete": False,
            "cases": [],
            "goals": [],
        }
        self.write()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    def run(self, kind: str, settings: dict, work: Callable[[], dict]) -> dict:
        """Run a case and keep what it returns, its error, or why it was left out."""
        case = {"kind": kind, **settings}
        started = time.perf_counter()
        if self.lost:
            case["skipped"] = "the device failed in an earlier case"
        elif self.spent > self.budget_s:
            case["skipped"] = f"the budget of {self.budget_s:g} s is used up"
        else:
            try:
                case |= work()
            except Exception as error:  # a case that fails says so, and the stage goes on
                case["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
                case["where"] = deepest(error)
            # not above: the exception being handled holds on to the case's tensors
            if "error" in case:
                self._recover()
            case["seconds"] = round(time.perf_counter() - started, 3)
        self.data["cases"].append(case)
        shown = case.get("error") or case.get("skipped") or ""
        said = " ".join(f"{k}={v}" for k, v in settings.items())
        print(f"[{self.spent:6.1f} s] {kind} {said} {shown}", file=sys.stderr, flush=True)
        self.write()
        return case

    def _recover(self) -> None:
        """Give back what the failed case held; an error that stays is the device's end for this
        process.
        """
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except Exception:  # every later call would fail alike
                self.lost = True

    def finish(self, goals: list[Goal]) -> dict:
        self.data["goals"] = [asdict(goal) for goal in goals]
        self.data["complete"] = not any("skipped" in case for case in self.data["cases"])
        self.write()
        return self.data

    def write(self) -> None:
        self.data["seconds"] = round(self.spent, 2)
        atomic_write_text(self.path, json.dumps(self.data, indent=1) + "\n")


def deepest(error: Exception) -> str:
    """The last line of this package that the error went through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename
    ]
    last = ours[-1]  # `run` itself is among them
    return f"{Path(last.filename).relative_to(ROOT)}:{last.lineno} {last.name}"


def driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def found(cases: list[dict], kind: str, value: str, **settings) -> list[float]:
    """`value` of the cases of a kind that have it and agree with `settings`."""
    return [
        case[value]
        for case in cases
        if case["kind"] == kind
        and case.get(value) is not None
        and all(case.get(k) == v for k, v in settings.items())
    ]


def summarise(out: Path) -> dict:
    """summary.json: what every stage's file in `out` says about the goals, and how its cases
    went.
    """
    stages = {}
    goals: list[dict] = []
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        if "stage" not in data:
            continue
        cases = data["cases"]
        stages[data["stage"]] = {
            "cases": len(cases),
            "failed": sum("error" in c for c in cases),
            "skipped": sum("skipped" in c for c in cases),
            "seconds": data["seconds"],
            "complete": data["complete"],
            "size": data["size"],
            "device": data["device"],
        }
        goals += data["goals"]
    summary = {"stages": stages, "goals": goals}
    atomic_write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary
