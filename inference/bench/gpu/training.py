"""Stage `training`: the fused draft loss against the naive one, and a training step of a head where
that can run.

The loss is this package's to time. A step is `python -m train.main` and `inference.bench.train` in
processes of their own, as this package knows nothing of training; they need DeepSpeed and more, and
are left out where that is missing.

S unrolled steps, U positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from inference.bench.environment import PeakMemory
from kernels.draft_loss import Objective, draft_loss, draft_loss_reference

from .clock import Stopwatch
from .record import Goal, Record, found
from .sizes import Size, require_memory

NEEDED = ("deepspeed", "datasets", "fire", "pydantic", "omegaconf", "rich", "tensorboardX")
ROOT = Path(__file__).parents[3]
FUSED = {"fused": draft_loss, "naive": draft_loss_reference}


def run(record: Record, size: Size, device: torch.device) -> list[Goal]:
    for which in FUSED:
        record.run(
            "draft_loss",
            {
                "which": which,
                **dict(zip(("steps", "positions", "hidden", "vocab"), size.loss, strict=True)),
            },
            lambda w=which: loss(w, size, device),
        )
    record.run("step", {"base": "embedded"}, lambda: step(device, record))
    return goals(record.data["cases"], device)


def goals(cases: list[dict], device: torch.device) -> list[Goal]:
    def ratio(value: str) -> float | None:
        fused, naive = (
            next(iter(found(cases, "draft_loss", value, which=w)), None) for w in ("fused", "naive")
        )
        return fused / naive if fused and naive else None

    return [
        Goal.judge("draft loss, fused / naive: memory", ratio("peak_bytes"), device, most=0.35),
        Goal.judge("draft loss, fused / naive: time", ratio("ms"), device, most=0.8),
    ]


def loss(which: str, size: Size, device: torch.device) -> dict:
    """Forward and backward with gradients of the hidden states and the projection. peak_bytes:
    above what the inputs hold (on a GPU; on a CPU how far the process grew)."""
    S, U, H, V = size.loss
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    require_memory(device, 40.0 * S * U * V if which == "naive" else 6.0 * U * V)
    torch.manual_seed(0)
    hidden = torch.randn(S, U, H, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, H, device=device, dtype=dtype) / H**0.5).requires_grad_()
    states = torch.randn(U, H, device=device, dtype=dtype)
    projection = torch.randn(V, H, device=device, dtype=dtype) / H**0.5
    importance = torch.full((S, U), 1 / (S * U), device=device)

    def teacher(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = states[start:stop] @ projection.T
        return logits, logits.argmax(-1)

    def work() -> None:
        out = FUSED[which](hidden, weight, teacher, importance, Objective())
        out.total.backward()
        hidden.grad = weight.grad = None

    watch = Stopwatch(device, size)
    work()
    watch.wait()
    before = torch.cuda.memory_allocated(device) if watch.cuda else 0
    memory = PeakMemory(device)
    memory.start()
    work()
    watch.wait()
    return {"peak_bytes": memory.bytes() - before, "ms": watch.device_ms(work)}


def step(device: torch.device, record: Record) -> dict:
    """Training steps of a head for the embedded model, through the trainer's own commands."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {
            "not_measured": f"a step needs {', '.join(missing)}; install the package's requirements"
        }
    if device.type != "cuda":
        return {
            "not_measured": "a step on a CPU tells nothing of a GPU; python -m inference.bench.train has its own"
        }
    return measured_step(60, max(30.0, record.budget_s - record.spent))


def measured_step(steps: int, seconds: float) -> dict:
    """perf: medians of a run's perf.jsonl (tokens/s, MFU, memory). arms: of
    `inference.bench.train`, which trains with the fused and the naive loss in turns. Each in a
    process of at most `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        out, found = Path(folder), Path(folder) / "bench.json"
        command(
            seconds,
            "train.main",
            "--data_format",
            "fim",
            "--output",
            str(out / "run"),
            f"train.max_steps={steps}",
            "train.perf_every=5",
            "eval.num_prompts=0",
        )
        command(
            seconds,
            "inference.bench.train",
            "--arms",
            "fused,naive",
            "--loss_tokens",
            "0",
            "--steps",
            str(max(1, steps // 15)),
            "--json_path",
            str(found),
        )
        perf = rates((out / "run" / "perf.jsonl").read_text("utf-8"))
        return {"perf": perf, "arms": json.loads(found.read_text("utf-8"))["step"]}


def command(seconds: float, module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-500:]}")


def rates(text: str) -> dict:
    """perf.jsonl of a run -> medians of its numbers, the first line, which warms up, left out."""
    lines = [flat(json.loads(line)) for line in text.splitlines() if line.strip()][1:]
    if not lines:
        raise ValueError("perf.jsonl has too few lines; raise train.max_steps")
    return {
        key: statistics.median(line[key] for line in lines if key in line)
        for key, value in lines[-1].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def flat(row: dict) -> dict:
    """{"memory": {"resident": 1}} -> {"memory.resident": 1}, one level."""
    nested = {k: v for k, v in row.items() if isinstance(v, dict)}
    deeper = {f"{k}.{name}": value for k, v in nested.items() for name, value in v.items()}
    return {k: v for k, v in row.items() if k not in nested} | deeper
