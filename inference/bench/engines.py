"""Measure stock `generate`, our plain engine and the speculative engine, interleaved in one
process: `python -m inference.bench`.

Each batch of prompts is run by every engine in turn, `repeats` times; a batch's time is the median
of its repeats, prompt processing included.
"""

from __future__ import annotations

import dataclasses

import torch

from eagle.errors import EagleError
from eagle.loading import fast_bf16
from eagle.tree import TreeShape
from inference.bench import compare
from inference.bench.cases import ENGINES, Case, Sweep, with_context
from inference.bench.engines_page import sections, title
from inference.bench.measure import measure_group
from inference.bench.record import Record, portable
from inference.bench.timing import say
from inference.generate import load_model
from records.prompts import load_prompts


def bench(
    *,
    base: str | None = None,
    head: str | None = None,
    adapter: str | None = None,
    quantization: str = "none",
    prompts: str | None = None,
    engines: str | None = None,
    batch_sizes: str = "1",
    tree: str | None = None,
    trees: str | None = None,
    context_lengths: str | None = None,
    capacities: str | None = None,
    temperature: float = 0.0,
    temperatures: str | None = None,
    forced_acceptance: int | None = None,
    max_new_tokens: int = 128,
    top_p: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    num_prompts: int = 20,
    repeats: int = 3,
    dtype: str = "auto",
    device: str | None = None,
    json: str | None = None,
    report: str | None = None,
) -> None:
    """Throughput of every engine on the same prompts, acceptance, and whether outputs are equal
    (when sampling, among our own engines: stock generate draws other random numbers).

    Without --base the embedded model and its held-out prompts are used. --prompts takes a JSONL
    file of prompts, FIM pairs, chats, or MT-Bench/Spec-Bench questions.

    --engines: some of hf, hf_prompt_lookup (both stock generate), vanilla, vanilla_compiled (ours,
    without drafting), eagle, eagle_compiled, eagle_auto (which picks its tree, and is left out by
    default where --tree or --trees picks it, or acceptance is forced).

    Sweeps measure every combination: --batch_sizes 1,8 --trees "8,4,2;16,4,4" --context_lengths
    64,1024 --capacities 512,8192 --temperatures 0,0.8. --forced_acceptance K makes every cycle keep
    K draft tokens, right or wrong, which measures the engine apart from the head.

    --json FILE and --report FILE.md keep the result."""
    asked = dict(locals())
    record = Record("", bench, asked, "num_prompts", "repeats", "max_new_tokens")
    sweep = sweep_of(asked)
    first = sweep.trees[0]
    model = load_model(base, head, adapter, first, dtype, device, quantization=quantization)
    if model.drafter is None and any(engine.startswith("eagle") for engine in sweep.engines):
        raise EagleError("no draft head to measure: give --head PATH, or --engines hf,vanilla")
    ids = [p.ids for p in load_prompts(prompts, model.tokenizer, num_prompts)]
    longest, limit = max(n or 0 for n in sweep.context_lengths), model.target.max_positions
    if longest and longest + max_new_tokens > limit:
        raise EagleError(
            f"a context of {longest} and {max_new_tokens} new tokens are more than the model's "
            f"{limit} positions; lower context_lengths or max_new_tokens"
        )
    record.device = model.target.device
    options = dict(max_new_tokens=max_new_tokens, top_p=top_p, top_k=top_k, seed=seed)
    result = record.result(**measure(model, ids, sweep, options, repeats))
    record.hand_over(result, title(result), sections(result))


def sweep_of(asked: dict) -> Sweep:
    """What the flags of `bench` ask to be measured."""
    forced = asked["forced_acceptance"]
    if forced is not None and forced < 0:
        raise EagleError(f"forced_acceptance must be at least 0, not {forced}")
    for one, several in (("tree", "trees"), ("temperature", "temperatures")):
        if asked[one] and asked[several]:
            raise EagleError(f"give --{one} for one or --{several} for several, not both")
    trees = parse_trees(asked["trees"] or asked["tree"])
    names = parse_engines(asked["engines"], own_tree=not trees and forced is None)
    if forced is not None and "eagle_auto" in names:
        raise EagleError("eagle_auto picks no tree where acceptance is forced; leave it out")
    temperatures = parse_numbers("temperatures", asked["temperatures"], float)
    counts = ("batch_sizes", "context_lengths", "capacities")
    values = {name: parse_numbers(name, asked[name]) or (None,) for name in counts}
    values |= {"trees": trees or (None,), "temperatures": temperatures or (asked["temperature"],)}
    sweep = Sweep(names, forced_acceptance=forced, **values)
    if not sweep.groups():
        raise EagleError("hf_prompt_lookup takes one row at a time; add --batch_sizes 1")
    return sweep


def parse_engines(text: str | None, own_tree: bool = True) -> list[str]:
    """In the order of ENGINES. own_tree: may eagle_auto be among those that nobody named?"""
    if text is None:
        return [e for e in ENGINES if own_tree or e != "eagle_auto"]
    asked = {part.strip() for part in text.split(",")}
    if unknown := sorted(asked - set(ENGINES)):
        raise EagleError(f"unknown engine {', '.join(unknown)!r}; use {', '.join(ENGINES)}")
    return [e for e in ENGINES if e in asked]


def parse_numbers(flag: str, text: str | None, kind: type = int) -> list:
    """ "1,4" -> [1, 4], each once; counts are at least 1, other numbers at least 0."""
    if text is None:
        return []
    try:
        numbers = [kind(part) for part in str(text).strip("()[]").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not min(numbers) >= (1 if kind is int else 0):
        raise EagleError(f"{flag} {text!r} is no list of numbers; write for instance --{flag} 1,4")
    return list(dict.fromkeys(numbers))


def parse_trees(text: str | None) -> list[str]:
    """ "8,4,2;16,4,4" -> ["8,4,2", "16,4,4"]."""
    parts = text.split(";") if text is not None else []
    return list(dict.fromkeys(str(TreeShape.parse(part)) for part in parts))


def measure(model, ids: list[list[int]], sweep: Sweep, options: dict, repeats: int) -> dict:
    """What the bench's JSON has of its own. options: max_new_tokens, top_p, top_k, seed."""
    target, notes, warm_up, explain = model.target, [], {}, {}
    if sweep.trees == (None,) and model.drafter:
        sweep = dataclasses.replace(sweep, trees=(str(model.drafter.shape),))
    if "hf_prompt_lookup" in sweep.engines and max(sweep.batch_sizes) > 1:
        notes.append("hf_prompt_lookup is left out above batch size 1: it takes one row at a time")
    if target.dtype == torch.bfloat16 and not fast_bf16(target.device):
        notes.append("this CPU emulates bf16, slowly: pass --dtype float32")
    for note in notes:
        say(note)
    runs, verdicts, groups = [], [], sweep.groups()
    with torch.inference_mode():
        for engine in sweep.engines:
            say(f"preparing {engine}")
            case = Case(engine)
            parts = model.prepare(compile=case.mode, draft=case.speculative)
            warm_up[engine] = {part: round(s, 2) for part, s in parts.items()}
        for number, group in enumerate(groups, 1):
            prompts = with_context(ids, group[0].context_length)
            say(f"group {number} of {len(groups)}, batch size {group[0].batch_size}")
            found = measure_group(model, prompts, group, options, repeats)
            runs += found
            if any(case.tree == "auto" and sweep.leads(case) for case in group):
                explain[str(group[0].batch_size)] = str(model.explain())
            verdicts += compare.judge_group(model, prompts, found, options)
    rows = []
    for run, verdict in zip(runs, verdicts, strict=True):
        rows.append({**run.to_json(), **compare.against_baselines(run, runs), **verdict})
    main = [run for run in runs if sweep.leads(run.case)]
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "model": portable(target.name),
        "tree": sweep.trees[0],
        "num_prompts": len(ids),
        "repeats": repeats,
        **options,
        "temperature": sweep.temperatures[0],
        "forced_acceptance": sweep.forced_acceptance,
        "notes": notes,
        "warm_up_s": warm_up,
        "runs": rows,
        **compare.headline(main),
        **compare.overall([rows[runs.index(run)] for run in main]),
        "explain": explain,
    }
