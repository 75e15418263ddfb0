"""Samples per second of batched generation over slots against one sample at a time.

Knows problems and the engine; knows nothing of judging.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

from inference.bench.environment import describe as environment
from inference.bench.environment import load

from .generating import Generator
from .generations import Sampling


def measure(model, problems, sampling: Sampling, n_samples: int, slots: int, repeats: int) -> dict:
    """The same completions (same prompts and seeds) in three ways, in turn, `repeats` times;
    medians.

    one_at_a_time: the engine without drafting, a batch of one. slots: as `evaluate` generates,
    without drafting (`slots_vanilla`) and with the head (`slots_eagle`), where there is one.
    `same_programs`: in float32 all ways must give the same completions.
    """
    ways = {"one_at_a_time": ("vanilla", 1), "slots_vanilla": ("vanilla", slots)}
    if model.drafter is not None:
        ways["slots_eagle"] = ("eagle", slots)
    generators = {
        name: Generator(model, replace(sampling, engine=engine), output="")
        for name, (engine, _) in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, dict] = {}
    for repeat in range(repeats + 1):  # the first is to warm up, and to compile where asked
        for name, (_, rows) in ways.items():
            generator = generators[name]
            wanted = generator.wanted(problems, n_samples)
            if not repeat:
                wanted = wanted[: max(rows, 2)]
            started = time.perf_counter()
            samples = [sample for _, sample in generator.generate(wanted, rows)]
            spent = time.perf_counter() - started
            print(f"{name}: {len(samples)} samples in {spent:.2f} s", file=sys.stderr, flush=True)
            if repeat:
                seconds[name].append(spent)
                found[name] = {(s.task_id, s.sample): s for s in samples}
    rates = {}
    for name, samples in found.items():
        median = statistics.median(seconds[name])
        tokens = sum(s.new_tokens for s in samples.values())
        cycles = sum(s.cycles for s in samples.values())
        rates[name] = {
            "slots": ways[name][1],
            "samples": len(samples),
            "new_tokens": tokens,
            "seconds": [round(s, 3) for s in seconds[name]],
            "samples_per_second": round(len(samples) / median, 3),
            "tokens_per_second": round(tokens / median, 1),
            "tau": round((tokens - len(samples)) / cycles, 3) if cycles else None,
        }
    base = rates["one_at_a_time"]["samples_per_second"]
    outputs = [{key: s.output for key, s in samples.items()} for samples in found.values()]
    return {
        "model": model.target.name,
        "dtype": str(model.target.dtype).removeprefix("torch."),
        "compile": sampling.compile,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "problems": len(problems),
        "n_samples": n_samples,
        "repeats": repeats,
        "ways": rates,
        "vs_one_at_a_time": {
            name: round(rates[name]["samples_per_second"] / base, 3)
            for name in ways
            if name != "one_at_a_time"
        },
        "same_programs": all(o == outputs[0] for o in outputs),
        "environment": {**environment(model.target.device), "load_end": load()},
    }
