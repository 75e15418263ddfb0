"""Measure a queue of requests over slots against fixed batches of as many rows.

    python -m inference.bench.slots --num_prompts 64 --slots 8

The prompts are the embedded model's held-out ones, or --prompts FILE, and each asks for a length of
its own between a quarter and seven quarters of --max_new_tokens, as requests do. Both ways run in
turn; the last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time

from configs import cli


def slots(
    *,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    quantization: str = "none",
    prompts: str | None = None,
    num_prompts: int = 64,
    slots: int = 8,
    max_new_tokens: int = 96,
    tree: str | None = None,
    compile: str = "max",
    draft: bool = True,
    repeats: int = 3,
    dtype: str = "auto",
    device: str | None = None,
) -> None:
    """Tokens per second of `generate_many` over --slots, and of `generate` on batches of --slots
    rows.
    """
    from eagle.errors import EagleError
    from inference.bench.environment import describe
    from inference.generate import load_model
    from records.prompts import load_prompts

    for name, value in (("num_prompts", num_prompts), ("slots", slots), ("repeats", repeats)):
        if value < 1:
            raise EagleError(f"{name} must be at least 1, not {value}")
    if max_new_tokens < 4:
        raise EagleError(f"max_new_tokens must be at least 4, not {max_new_tokens}")
    model = load_model(base, head, adapter, tree, dtype, device, quantization=quantization)
    ids = [p.ids for p in load_prompts(prompts, model.tokenizer, num_prompts)]
    rng = random.Random(0)
    requests = [
        {
            "input_ids": p,
            "max_new_tokens": rng.randint(max_new_tokens // 4, 7 * max_new_tokens // 4),
        }
        for p in ids
    ]
    options = {"draft": draft, "compile": compile}

    def queue() -> list:
        return model.generate_many(requests, slots=slots, **options)

    def batches() -> list:
        rows = []
        for start in range(0, len(requests), slots):
            rows += model.generate(requests[start : start + slots], **options).rows
        return rows

    ways, seconds = {"slots": queue, "batches": batches}, {"slots": [], "batches": []}
    outputs = {}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, work in ways.items():
            started = time.perf_counter()
            outputs[name] = work()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {time.perf_counter() - started:.2f} s", file=sys.stderr, flush=True)
    tokens = {name: sum(len(row.tokens) for row in rows) for name, rows in outputs.items()}
    rates = {name: tokens[name] / statistics.median(seconds[name]) for name in ways}
    result = {
        "environment": describe(model.target.device),
        "model": model.target.name,
        "num_prompts": len(ids),
        "slots": slots,
        "max_new_tokens": max_new_tokens,
        "tree": tree,
        "compile": compile,
        "draft": draft,
        "repeats": repeats,
        "seconds": seconds,
        "new_tokens": tokens,
        "tokens_per_second": {k: round(v, 2) for k, v in rates.items()},
        "slots_vs_batches": round(rates["slots"] / rates["batches"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cli.main(slots, name="python -m inference.bench.slots")
