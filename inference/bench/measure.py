"""How a group of cases is timed, in turns, and what each of them took."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from eagle.decode import Timings
from eagle.model import acceptance_by_depth
from inference.bench.cases import Case
from inference.bench.timing import PeakMemory, say, timed, turns

LOOKUP_TOKENS = 10
PHASES = ("prefill", "draft", "verify", "commit")


@dataclass
class Lap:
    """One case on one batch, once."""

    seconds: float
    outputs: list[list[int]]  # new tokens a row
    rows: list = field(default_factory=list)  # decode.Row, ours only
    timings: Timings = field(default_factory=Timings)
    peak_bytes: int = 0
    exact: bool | None = None

    @property
    def cycles(self) -> int:
        """Passes over the batch after the prompts'."""
        return max((row.cycles for row in self.rows), default=0)


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
    exact: bool | None = None  # as of `Generation`; stock `generate` does not tell

    def add(self, laps: list[Lap], phased: list[Lap]) -> None:
        """A batch's repeats. phased: those that tell the phases apart."""
        last = laps[-1]
        self.batch_seconds.append([lap.seconds for lap in laps])
        self.batch_tokens.append(sum(map(len, last.outputs)))
        self.outputs += last.outputs
        self.exact = last.exact
        self.rows += last.rows
        self.peak_bytes = max(self.peak_bytes, *(lap.peak_bytes for lap in laps))
        self.cycles += statistics.median(lap.cycles for lap in phased)
        for name in PHASES:
            self.phases[name] += statistics.median(getattr(lap.timings, name) for lap in phased)

    @property
    def medians(self) -> list[float]:
        """Seconds of each batch."""
        return [statistics.median(repeats) for repeats in self.batch_seconds]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.batch_tokens) / sum(self.medians)

    @property
    def tau(self) -> float | None:
        """Tokens gained per verification and row; stock `generate` does not tell."""
        if not self.rows:
            return None
        cycles = sum(row.cycles for row in self.rows)
        return (sum(self.batch_tokens) - len(self.rows)) / cycles if cycles else 0.0

    def to_json(self) -> dict:
        ms = dict.fromkeys(["cycle", *PHASES])
        rates = None
        if self.rows:
            rates = acceptance_by_depth([row.accepted for row in self.rows])
            rates = [round(rate, 3) for rate in rates]
            ms = {name: 1e3 * self.phases[name] / max(self.cycles, 1) for name in PHASES[1:]}
            ms["cycle"] = sum(ms.values())
            ms["prefill"] = 1e3 * self.phases["prefill"] / len(self.batch_tokens)
        return {
            **vars(self.case),
            "new_tokens": sum(self.batch_tokens),
            "seconds": round(sum(self.medians), 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "exact": self.exact,
            "tau": round(self.tau, 3) if self.rows else None,
            "acceptance_by_depth": rates,
            **{f"{name}_ms": v if v is None else round(v, 3) for name, v in ms.items()},
            "peak_memory_mb": round(self.peak_bytes / 2**20, 1),
            "looping": round(sum(map(loops, self.outputs)) / max(len(self.outputs), 1), 3),
            "batch_tokens": self.batch_tokens,
            "batch_seconds": [[round(s, 5) for s in repeats] for repeats in self.batch_seconds],
        }


def loops(tokens: list[int]) -> bool:
    """The last 24 or more tokens repeat with a period <= 24, three times at least."""
    for period in range(1, 25):
        span = max(24, 3 * period)
        tail = tokens[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False


def measure_group(
    model, prompts: list[list[int]], group: list[Case], options: dict, repeats: int
) -> list[Run]:
    """Run every case of the group on every batch of prompts, `repeats` times, in turns.

    options: max_new_tokens, top_p, top_k and seed, the same for all."""
    size = group[0].batch_size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    for case in group:
        warm_up(model, case, batches, options)
    runs = {case: Run(case) for case in group}
    started = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        laps: dict[Case, list[Lap]] = {case: [] for case in group}
        for case in turns(group, repeats, number):
            laps[case].append(run_case(case, model, batch, options))
        for case, run in runs.items():
            phased = laps[case]
            if model.target.device.type == "cuda" and not case.stock:
                # waiting for the device after each phase tells the phases apart and costs time:
                # once more for that
                phased = [run_case(case, model, batch, options, synchronised=True)]
            run.add(laps[case], phased)
        left = (time.perf_counter() - started) / number * (len(batches) - number)
        say(f"{number}/{len(batches)} batches, about {left:.0f} s left")
    return list(runs.values())


def warm_up(model, case: Case, batches: list[list[list[int]]], options: dict) -> None:
    """An eager engine needs a few tokens. A compiled one may compile for a new number of rows or a
    longer context, so it runs the longest batch of each number of rows to its end. tree="auto"
    measures what passes cost for each number of rows and length of context that it meets, so it
    runs every batch."""
    if case.mode == "off":
        options = {**options, "max_new_tokens": min(16, options["max_new_tokens"])}
        batches = batches[:1]
    elif case.tree != "auto":
        longest = sorted(batches, key=lambda batch: max(map(len, batch)))
        batches = list({len(batch): batch for batch in longest}.values())
    for batch in batches:
        run_case(case, model, batch, options)


def run_case(
    case: Case, model, batch: list[list[int]], options: dict, synchronised: bool = False
) -> Lap:
    if case.stock:
        return run_stock(case, model, batch, options)
    timings, device = Timings(), model.target.device
    more = {"timings": timings, "synchronise": synchronised, **options, **case.options}
    memory = PeakMemory(device)
    spent, made = timed(lambda: model.generate(batch, **more), device)
    outputs = [row.tokens for row in made.rows]
    return Lap(spent, outputs, made.rows, timings, memory.bytes(), made.exact)


def run_stock(case: Case, model, batch: list[list[int]], options: dict) -> Lap:
    """transformers' own `generate` on the same weights: left padding, its own cache, attention."""
    eos, device = sorted(model.eos_token_ids), model.target.device
    pad, width = eos[0] if eos else 0, max(map(len, batch))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
    more: dict = {"do_sample": case.temperature > 0.0}
    if case.temperature > 0.0:
        torch.manual_seed(options["seed"])
        more |= {"temperature": case.temperature}
        more |= {"top_p": options["top_p"] or 1.0, "top_k": options["top_k"]}
    if case.engine == "hf_prompt_lookup":
        more["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
    more |= {"eos_token_id": eos or None, "pad_token_id": pad, "attention_mask": real}
    more["max_new_tokens"] = options["max_new_tokens"]
    with model.target.stock() as stock:
        memory = PeakMemory(device)
        spent, out = timed(lambda: stock.generate(ids, **more), device)
    outputs = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row))
        outputs.append(row[: end + 1])
    return Lap(spent, outputs, peak_bytes=memory.bytes())
