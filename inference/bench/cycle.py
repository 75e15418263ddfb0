"""Where a cycle of generation spends its time, how many torch calls it makes, and where it waits.

A cycle lies between two commits with all rows in flight; the first, which follows the prompts, is
left out. Times, calls and operators are each of a generation of their own, so that none's cost
shows in another's figures.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.profiler import profile

from eagle.decode import Timings
from eagle.errors import EagleError
from inference.bench.record import Record
from inference.bench.report import Section, tabulate
from inference.generate import load_model
from records.prompts import load_prompts

OURS = tuple(str(Path(__file__).parents[2] / folder) for folder in ("eagle", "kernels"))
# what makes the host wait for a tensor's values
READS = set("tolist item cpu numpy nonzero unique __bool__ __int__ __float__ __index__".split())
TOP = 25


def cycle(
    *,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    quantization: str = "none",
    batch_size: int = 1,
    tree: str | None = None,
    compile: str = "auto",
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str | None = None,
    json: str | None = None,
    report: str | None = None,
) -> None:
    """Profile the cycles of greedy generation on held-out prompts. Without --base, the embedded
    model.

    --tree total_token,depth,top_k, or auto. --compile off, auto or max. End tokens are ignored, so
    that rows stay in flight. The operators' times are larger than those of the phases, as
    torch.profiler watches each of them; what runs inside a compiled pass it does not see.
    """
    record = Record("cycle", cycle, dict(locals()), "batch_size")
    # the profiler's library says on stderr when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    model = load_model(base, head, adapter, tree, dtype, device, compile, quantization=quantization)
    if model.drafter is None:
        raise EagleError("no draft head to profile: give --head PATH")
    room = model.target.max_positions - max_new_tokens - batch_size
    if max_new_tokens < 8 or room < 1:
        raise EagleError(
            f"max_new_tokens {max_new_tokens}: give 8 or more, and fewer than the model's "
            f"{model.target.max_positions} positions"
        )
    ids = [p.ids for p in load_prompts(None, model.tokenizer)]
    # of differing lengths, as requests have
    prompts = [ids[i % len(ids)][-(room + i) :] for i in range(batch_size)]
    record.device = model.target.device
    found = measure(model, prompts, max_new_tokens)
    record.runs = found.pop("phases")
    result = record.result(model=model.target.name, **found)
    title = f"{result['model']}, {batch_size} rows, tree {model.tree}, tau {result['tau']}"
    record.hand_over(result, title, sections(result))


def measure(model, prompts: list[list[int]], new: int) -> dict:
    """Phases, operators, host reads and torch calls of a typical cycle."""

    def generate(**more):
        return model.generate(prompts, max_new_tokens=new, eos_token_id=-1, **more)

    model.prepare()
    generate()  # warm-up; with tree "auto" it also measures what passes cost
    phases, tau = time_phases(generate, len(prompts))
    calls = count_calls(generate, len(prompts))
    return {
        "tau": round(tau, 2),
        "phases": phases,
        "operators": operators(generate),
        "host_reads": {name: n for (kind, name), n in calls.items() if kind == "read"},
        "torch_calls": sum(n for (kind, _), n in calls.items() if kind == "call"),
    }


def by_cycle(generate: Callable, rows: int, so_far: Callable, **more) -> tuple[list[Counter], Any]:
    """What `so_far()` counts in each cycle, and the generation."""
    marks: list[Counter] = []

    def mark(cache, drafter) -> None:
        if len(cache.order) == rows:  # a row that ended takes part in no later cycle
            marks.append(Counter(so_far()))

    made = generate(on_cache=mark, **more)
    cycles = [Counter({name: b[name] - a[name] for name in b}) for a, b in pairwise(marks[1:])]
    if not cycles:
        raise EagleError("a row is done within a cycle or two; raise max_new_tokens")
    return cycles, made


def time_phases(generate: Callable, rows: int) -> tuple[list[dict], float]:
    """A row a phase: mean milliseconds a cycle, and its share; and tau."""
    timings, names = Timings(), ("commit", "draft", "verify")
    more = {"timings": timings, "synchronise": True}
    cycles, made = by_cycle(generate, rows, lambda: vars(timings), **more)
    ms = {name: 1e3 * statistics.fmean(c[name] for c in cycles) for name in names}
    ms["cycle"] = whole = sum(ms.values())
    return [{"phase": name, "ms": t, "share": t / whole} for name, t in ms.items()], made.tau


class Calls(TorchFunctionMode):
    """Counts what Python asks of torch, and `READS` by the line of ours that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        self.counter["call", name] += 1
        if name in READS:
            frame = sys._getframe(1)
            while frame is not None and not frame.f_code.co_filename.startswith(OURS):
                frame = frame.f_back
            code = frame.f_code if frame else None
            where = f"{Path(code.co_filename).name} {code.co_name}" if code else "elsewhere"
            self.counter["read", f"{where}: {name}"] += 1
        return func(*args, **(kwargs or {}))


def count_calls(generate: Callable, rows: int) -> dict[tuple[str, str], float]:
    """("call" or "read", name) -> the median over cycles of a generation of `rows` rows."""
    with Calls() as calls:
        cycles, _ = by_cycle(generate, rows, lambda: calls.counter)
    names = sorted({name for found in cycles for name in found})
    typical = {name: statistics.median(found[name] for found in cycles) for name in names}
    return {name: number for name, number in typical.items() if number}


def operators(generate: Callable) -> list[dict]:
    """What torch.profiler sees of a whole generation: self time and calls a name, the largest."""
    with profile() as profiler:
        generate()
    found = []
    for event in profiler.key_averages():
        host, device = event.self_cpu_time_total / 1e3, event.self_device_time_total / 1e3
        row = {"operator": event.key, "host_ms": host, "device_ms": device}
        found.append({**row, "calls": event.count})
    return sorted(found, key=lambda row: -max(row["host_ms"], row["device_ms"]))[:TOP]


def sections(result: dict) -> list:
    phases = tabulate(result["runs"], phase="phase", ms="ms:.3f", share="share:.1%")
    columns = {name: f"{name}:.3f" for name in ("host_ms", "device_ms")}
    top = tabulate(result["operators"], operator="operator", **columns, calls="calls")
    reads = [[name, f"{number:g}"] for name, number in result["host_reads"].items()]
    waits, calls = sum(result["host_reads"].values()), result["torch_calls"]
    note = f"{waits:g} host reads, {calls:g} torch calls a cycle"
    return [
        Section("Milliseconds a cycle", phases, note),
        Section("Operators of a whole generation, self time", top),
        Section("Host reads a cycle", [["where", "reads"], *reads]),
    ]
