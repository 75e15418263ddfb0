"""Where a cycle of generation spends its time, how many torch calls it makes, and where it waits.

A cycle lies between two commits with all rows in flight; the first, which follows the prompts, is
left out. Times, calls and operators are each of a generation of their own, so that no one's cost
shows in another's figures.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch.overrides import TorchFunctionMode

from eagle.errors import EagleError

OURS = tuple(str(Path(__file__).parents[2] / folder) for folder in ("eagle", "kernels"))
# what makes the host wait for a tensor's values
READS = set("tolist item cpu numpy nonzero unique __bool__ __int__ __float__ __index__".split())
# two sizes of one depth: what a cycle does more often for the larger one runs over nodes
TREES = ("16,4,4", "60,4,10")
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
    asked = dict(locals())
    # the profiler's library says on stderr when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from eagle.model import MODES
    from inference.bench.engines import require_counts
    from inference.bench.record import hand_over, record_of, require_files
    from inference.generate import load_model
    from records.prompts import load_prompts

    require_counts(batch_size=batch_size)
    if max_new_tokens < 8:
        raise EagleError(f"max_new_tokens {max_new_tokens} leaves no cycle to see; give 8 or more")
    if compile not in MODES:
        raise EagleError(f"unknown compile {compile!r}; use {', '.join(MODES)}")
    require_files(json, report)
    model = load_model(base, head, adapter, tree, dtype, device, compile, quantization=quantization)
    if model.drafter is None:
        raise EagleError("no draft head to profile: give --head PATH")
    ids = [p.ids for p in load_prompts(None, model.tokenizer)]
    record = record_of("cycle", cycle, asked, model.target.device)
    summary = measure(model, some_prompts(ids, batch_size, model, max_new_tokens), max_new_tokens)
    record.runs = summary.pop("phases")
    result = record.result(model=model.target.name, **summary)
    title = f"{result['model']}, {batch_size} rows, tree {model.tree}, tau {result['tau']}"
    hand_over(result, title, sections(result), json, report)


def some_prompts(ids: list[list[int]], rows: int, model, new: int) -> list[list[int]]:
    """`rows` prompts of differing lengths, as requests have, that leave room for `new` tokens."""
    limit = model.target.max_positions
    room = limit - new - rows
    if room < 1:
        raise EagleError(
            f"{rows} rows of {new} new tokens do not fit the model's {limit} positions; "
            "lower max_new_tokens"
        )
    return [ids[i % len(ids)][-(room + i) :] for i in range(rows)]


def measure(model, prompts: list[list[int]], new: int) -> dict:
    """Phases, operators, host reads and torch calls of a typical cycle."""

    def generate(**more):
        return model.generate(prompts, max_new_tokens=new, eos_token_id=-1, **more)

    model.prepare()
    generate()  # warm-up; with tree "auto" it also measures what passes cost
    phases, tau = time_phases(generate, len(prompts))
    calls = count_calls(lambda hook: generate(on_cache=hook), len(prompts))
    at_sizes = {
        tree: count_calls(lambda hook, t=tree: generate(tree=t, on_cache=hook), len(prompts))
        for tree in TREES
    }
    return {
        "tau": round(tau, 2),
        "phases": phases,
        "operators": operators(generate),
        "host_reads": {name[1]: n for name, n in calls.items() if name[0] == "read"},
        "torch_calls": {tree: total(found, "call") for tree, found in at_sizes.items()},
        "explain": model.explain() if str(model.tree) == "auto" else None,
    }


class Marks:
    """Takes what has been counted at every commit with all rows in flight: `cycles` are the
    differences.
    """

    def __init__(self, rows: int, so_far: Callable[[], dict]) -> None:
        self.rows, self.so_far, self.marks = rows, so_far, []

    def __call__(self, cache, drafter) -> None:
        if len(cache.order) == self.rows:  # a row that ended takes part in no later cycle
            self.marks.append(Counter(self.so_far()))

    @property
    def cycles(self) -> list[Counter]:
        pairs = zip(self.marks[1:-1], self.marks[2:], strict=True)
        found = [Counter({name: b[name] - a[name] for name in b}) for a, b in pairs]
        if not found:
            raise EagleError("a row is done within a cycle or two; raise max_new_tokens")
        return found


def time_phases(generate: Callable, rows: int) -> tuple[list[dict], float]:
    """A row a phase: mean milliseconds a cycle, and its share; and tau."""
    from eagle.decode import Timings

    timings = Timings()
    marks = Marks(rows, lambda: vars(timings))
    tau = generate(on_cache=marks, timings=timings, synchronise=True).tau
    names = ("commit", "draft", "verify")
    ms = {name: 1e3 * statistics.fmean(c[name] for c in marks.cycles) for name in names}
    whole = sum(ms.values())
    rows = [{"phase": name, "ms": ms[name], "share": ms[name] / whole} for name in names]
    return [*rows, {"phase": "cycle", "ms": whole, "share": 1.0}], tau


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
    """("call" or "read", name) -> the median over cycles. generate(hook): runs a generation of
    `rows` rows whose commits the hook sees."""
    calls = Calls()
    marks = Marks(rows, lambda: calls.counter)
    with calls:
        generate(marks)
    names = {name for found in marks.cycles for name in found}
    typical = {name: statistics.median(c[name] for c in marks.cycles) for name in sorted(names)}
    return {name: number for name, number in typical.items() if number}


def total(found: dict[tuple[str, str], float], kind: str) -> float:
    return sum(number for (of, _), number in found.items() if of == kind)


def operators(generate: Callable) -> list[dict]:
    """What torch.profiler sees of a whole generation: self time and calls a name, the largest."""
    from torch.profiler import profile

    with profile() as profiler:
        generate()
    found = [
        {
            "operator": event.key,
            "host_ms": event.self_cpu_time_total / 1e3,
            "device_ms": event.self_device_time_total / 1e3,
            "calls": event.count,
        }
        for event in profiler.key_averages()
    ]
    return sorted(found, key=lambda row: -max(row["host_ms"], row["device_ms"]))[:TOP]


def sections(result: dict) -> list:
    from inference.bench.report import Section, tabulate

    reads = [{"where": name, "reads": number} for name, number in result["host_reads"].items()]
    sizes = [{"tree": tree, "calls": number} for tree, number in result["torch_calls"].items()]
    found = [
        Section(
            "Milliseconds a cycle",
            tabulate(result["runs"], phase="phase", ms="ms:.3f", share="share:.1%"),
            f"{sum(result['host_reads'].values()):g} host reads a cycle",
        ),
        Section(
            "Operators of a whole generation, self time",
            tabulate(
                result["operators"],
                operator="operator",
                host_ms="host_ms:.3f",
                device_ms="device_ms:.3f",
                calls="calls",
            ),
        ),
        Section("Host reads a cycle", tabulate(reads, where="where", reads="reads:g")),
        Section(
            "Torch calls a cycle",
            tabulate(sizes, tree="tree", calls="calls:g"),
            "Alike for both sizes: no Python loop over the nodes of a tree.",
        ),
    ]
    if result["explain"]:
        found.append(Section("The tree chosen", [], f"```\n{result['explain']}\n```"))
    return found
