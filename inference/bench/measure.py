"""How a group of cases is timed, interleaved, and what each of them took.

Knows token ids and engines; knows nothing of verdicts, reports or files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from inference.bench.cases import Case
from inference.bench.environment import PeakMemory

LOOKUP_TOKENS = 10
PHASES = ("prefill", "draft", "verify", "commit")


@dataclass(eq=False)
class Run:
    """What one case took, batch of prompts by batch of prompts."""

    case: Case
    batch_tokens: list[int] = field(default_factory=list)
    batch_seconds: list[list[float]] = field(default_factory=list)  # one a repeat
    outputs: list[list[int]] = field(default_factory=list)
    rows: list = field(default_factory=list)  # decode.Row of one repeat
    cycles: float = 0  # passes over a batch, medians of repeats
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peak_bytes: int = 0
    explain: str | None = None

    @property
    def medians(self) -> list[float]:
        """Seconds of each batch."""
        return [statistics.median(repeats) for repeats in self.batch_seconds]

    @property
    def new_tokens(self) -> int:
        return sum(self.batch_tokens)

    @property
    def seconds(self) -> float:
        return sum(self.medians)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def tau(self) -> float | None:
        """Tokens gained per verification and row; None for stock `generate`, which does not
        tell.
        """
        if not self.rows:
            return None
        cycles = sum(row.cycles for row in self.rows)
        return (self.new_tokens - len(self.rows)) / cycles if cycles else 0.0

    def to_json(self) -> dict:
        from eagle.model import acceptance_by_depth

        case = self.case
        row = {
            "engine": case.engine,
            "batch_size": case.batch_size,
            "tree": case.tree,
            "context_length": case.context_length,
            "capacity": case.capacity,
            "temperature": case.temperature,
            "forced_acceptance": case.forced_acceptance,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "tau": None,
            "acceptance_by_depth": None,
            "cycle_ms": None,
            "draft_ms": None,
            "verify_ms": None,
            "commit_ms": None,
            "prefill_ms": None,
            "peak_memory_mb": round(self.peak_bytes / 2**20, 1),
            "looping": round(looping_share(self.outputs), 3),
            "batch_tokens": self.batch_tokens,
            "batch_seconds": [[round(s, 5) for s in repeats] for repeats in self.batch_seconds],
        }
        if self.explain is not None:
            row["explain"] = self.explain
        if self.rows:
            row["tau"] = round(self.tau, 3)
            rates = acceptance_by_depth([r.accepted for r in self.rows])
            row["acceptance_by_depth"] = [round(a, 3) for a in rates]
            per_cycle = {name: 1e3 * self.phases[name] / max(self.cycles, 1) for name in PHASES[1:]}
            row["cycle_ms"] = round(sum(per_cycle.values()), 3)
            row.update({f"{name}_ms": round(value, 3) for name, value in per_cycle.items()})
            row["prefill_ms"] = round(1e3 * self.phases["prefill"] / len(self.batch_tokens), 3)
        return row


def looping_share(outputs: list[list[int]]) -> float:
    """Share of generations that end in a loop: the last 24 or more tokens repeat with a period <=
    24, three times at least."""

    def loops(tokens: list[int]) -> bool:
        for period in range(1, 25):
            span = max(24, 3 * period)
            tail = tokens[-span:]
            if len(tail) == span and tail[period:] == tail[:-period]:
                return True
        return False

    return sum(map(loops, outputs)) / len(outputs) if outputs else 0.0


def measure_group(
    model,
    prompts: list[list[int]],
    group: list[Case],
    options: dict,
    repeats: int,
    say: Callable[[str], None],
) -> list[Run]:
    """Run every case of the group on every batch of prompts, `repeats` times, in rotating order.

    options: max_new_tokens, top_p, top_k and seed, the same for all.
    """
    size = group[0].batch_size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    runs = {case: Run(case) for case in group}
    for case in group:
        warm_up(model, case, batches, options)
    started = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        measure_batch(model, batch, runs, options, repeats, number)
        spent = time.perf_counter() - started
        left = spent / number * (len(batches) - number)
        rate = sum(run.new_tokens for run in runs.values()) * repeats / spent
        say(f"{number}/{len(batches)} batches, {rate:.0f} tokens/s, about {left:.0f} s left")
    return list(runs.values())


def warm_up(model, case: Case, batches: list[list[list[int]]], options: dict) -> None:
    """An eager engine needs a few tokens. A compiled one may compile for a new number of rows or a
    longer context, so it runs the longest batch of each number of rows to its end. tree="auto"
    measures what passes cost for each number of rows and length of context that it meets, so it
    runs every batch."""
    if case.mode == "off":
        short = {**options, "max_new_tokens": min(16, options["max_new_tokens"])}
        run_case(case, model, batches[0], short)
        return
    longest: dict[int, list[list[int]]] = {}
    for batch in sorted(batches, key=lambda batch: max(map(len, batch))):
        longest[len(batch)] = batch
    for batch in batches if case.tree == "auto" else longest.values():
        run_case(case, model, batch, options)


def measure_batch(
    model, batch, runs: dict[Case, Run], options: dict, repeats: int, shift: int
) -> None:
    """Every case in turn, `repeats` times, each time beginning with another one and every second
    time backwards, so that no case always follows the same other."""
    cases = list(runs)
    laps: dict[Case, list[Lap]] = {case: [] for case in cases}
    for repeat in range(repeats):
        first = (shift + repeat) % len(cases)
        order = cases[first:] + cases[:first]
        for case in order if repeat % 2 == 0 else order[::-1]:
            laps[case].append(run_case(case, model, batch, options))
    for case, run in runs.items():
        timed, last = laps[case], laps[case][-1]
        run.batch_seconds.append([lap.seconds for lap in timed])
        run.batch_tokens.append(sum(map(len, last.outputs)))
        run.outputs += last.outputs
        run.rows += last.rows
        run.peak_bytes = max(run.peak_bytes, *(lap.peak_bytes for lap in timed))
        run.explain = last.explain or run.explain
        if model.target.device.type == "cuda" and not case.stock:
            # waiting for the device after each phase tells the phases apart and costs time: once
            # more for that
            timed = [run_case(case, model, batch, options, synchronised=True)]
        run.cycles += statistics.median(lap.cycles for lap in timed)
        for name in PHASES:
            run.phases[name] += statistics.median(lap.phases[name] for lap in timed)


@dataclass
class Lap:
    """One case on one batch, once."""

    seconds: float
    outputs: list[list[int]]  # new tokens a row
    rows: list = field(default_factory=list)  # decode.Row, ours only
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peak_bytes: int = 0
    explain: str | None = None

    @property
    def cycles(self) -> int:
        """Passes over the batch after the prompts'."""
        return max((row.cycles for row in self.rows), default=0)


def run_case(
    case: Case, model, batch: list[list[int]], options: dict, synchronised: bool = False
) -> Lap:
    from eagle.decode import Timings

    memory = PeakMemory(model.target.device)
    if case.stock:
        return run_stock(case, model, batch, options, memory)
    timings = Timings()
    memory.start()
    synchronise(model)
    started = time.perf_counter()
    result = model.generate(
        batch, timings=timings, synchronise=synchronised, **options, **case.options
    )
    synchronise(model)
    spent = time.perf_counter() - started
    outputs = [row.tokens for row in result.rows]
    phases = {name: getattr(timings, name) for name in PHASES}
    lap = Lap(spent, outputs, result.rows, phases, memory.bytes())
    if case.tree == "auto" and lap.cycles:
        lap.explain = str(model.explain())
    return lap


def run_stock(case: Case, model, batch, options: dict, memory: PeakMemory) -> Lap:
    """transformers' own `generate` on the same weights: left padding, its own cache and
    attention.
    """
    import torch

    target = model.target
    eos = sorted(model.eos_token_ids)
    pad = eos[0] if eos else 0
    width = max(map(len, batch))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=target.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=target.device
    )
    more = {}
    if case.temperature > 0.0:
        torch.manual_seed(options["seed"])
        more = {
            "temperature": case.temperature,
            "top_p": options["top_p"] or 1.0,
            "top_k": options["top_k"],
        }
    if case.engine == "hf_prompt_lookup":
        more["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
    with target.stock() as stock:
        memory.start()
        synchronise(model)
        started = time.perf_counter()
        out = stock.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options["max_new_tokens"],
            do_sample=case.temperature > 0.0,
            eos_token_id=eos or None,
            pad_token_id=pad,
            **more,
        )
        synchronise(model)
        spent = time.perf_counter() - started
    outputs = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        outputs.append(row[: ends[0] + 1] if ends else row)
    return Lap(spent, outputs, peak_bytes=memory.bytes())


def synchronise(model) -> None:
    if model.target.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.target.device)
