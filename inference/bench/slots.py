"""Measure a queue of requests over slots against fixed batches of as many rows."""

from __future__ import annotations

import random
import statistics

from inference.bench.record import Record
from inference.bench.report import Section, tabulate
from inference.bench.timing import race
from inference.generate import load_model
from records.prompts import load_prompts


def measure_slots(
    *,
    base: str | None = None,
    head: str | None = None,
    prompts: str | None = None,
    num_prompts: int = 64,
    slots: int = 8,
    max_new_tokens: int = 96,
    tree: str | None = None,
    compile: str = "max",
    repeats: int = 3,
    dtype: str = "auto",
    device: str | None = None,
    json: str | None = None,
    report: str | None = None,
) -> None:
    """Tokens per second of `generate_many` over --slots, and of `generate` on batches of --slots
    rows.

    The prompts are the embedded model's held-out ones, or --prompts FILE, and each asks for a
    length of its own between a quarter and seven quarters of --max_new_tokens, as requests do.
    """
    asked = dict(locals())
    counts = ("num_prompts", "slots", "repeats", "max_new_tokens")
    record = Record("slots", measure_slots, asked, *counts)
    model = load_model(base, head, None, tree, dtype, device, compile)
    record.device, rng, quarter = model.target.device, random.Random(0), max_new_tokens // 4
    requests = [
        {"input_ids": prompt.ids, "max_new_tokens": 1 + rng.randint(quarter, 7 * quarter)}
        for prompt in load_prompts(prompts, model.tokenizer, num_prompts)
    ]

    def queue() -> list:
        return model.generate_many(requests, slots=slots)

    def batches() -> list:
        parts = [requests[start : start + slots] for start in range(0, len(requests), slots)]
        return [row for part in parts for row in model.generate(part).rows]

    seconds, rows = race({"slots": queue, "batches": batches}, repeats, record.device)
    for way, spent in seconds.items():
        tokens = sum(len(row.tokens) for row in rows[way])
        rate = round(tokens / statistics.median(spent), 2)
        run = {"way": way, "seconds": spent, "new_tokens": tokens, "tokens_per_second": rate}
        record.runs.append(run)
    over, fixed = (run["tokens_per_second"] for run in record.runs)
    result = record.result(model=model.target.name, slots_vs_batches=round(over / fixed, 3))
    lines = tabulate(record.runs, way="way", tokens="new_tokens", tokens_s="tokens_per_second")
    note = f"slots / batches: {result['slots_vs_batches']}"
    record.hand_over(result, "a queue over slots", [Section("Slots and batches", lines, note)])
