"""Measure stock `generate`, our plain engine and the speculative engine, interleaved in one
process.

    python -m inference.bench --batch_sizes 1,4 --tree 16,4,4 --json OUT.json --report OUT.md
    --plots DIR

Prints a table and, as the last line, one JSON object. Each batch of prompts is run by every engine
in turn, `repeats` times; a batch's time is the median of its repeats, prompt processing included.
"""

from __future__ import annotations

import inspect
import json as json_module
import sys
from pathlib import Path

from inference.bench.cases import COMPILED, ENGINES, PLAIN, Sweep, with_context
from inference.bench.measure import Run

# files of the person who ran it, or where results went: they do not reproduce anything
UNREPORTED = ("json", "report", "plots", "quiet")


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
    plots: str | None = None,
    quiet: bool = False,
) -> None:
    """Throughput of every engine on the same prompts, acceptance, and whether outputs are equal.

    Without --base the embedded model and its held-out prompts are used. --prompts takes a JSONL
    file of prompts, FIM pairs, chats, or MT-Bench/Spec-Bench questions.

    --engines: a list of hf, hf_prompt_lookup (both stock generate), vanilla, vanilla_compiled
    (ours, without drafting), eagle, eagle_compiled, eagle_auto (which picks its tree, and is left
    out by default where --tree or --trees picks it, or acceptance is forced). All by default.

    Sweeps measure every combination: --batch_sizes 1,8 --trees "8,4,2;16,4,4" --context_lengths
    64,1024 --capacities 512,8192 --temperatures 0,0.8. --forced_acceptance K makes every cycle keep
    K draft tokens, right or wrong, which measures the engine apart from the head.

    A temperature above 0 samples: stock generate draws other random numbers then, so equality is
    judged among our own engines alone.

    --json FILE, --report FILE.md and --plots DIR keep the result.
    """
    asked = {name: value for name, value in locals().items() if name in FLAGS}

    from eagle.errors import EagleError

    for name, value in (
        ("num_prompts", num_prompts),
        ("repeats", repeats),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise EagleError(f"{name} must be at least 1, not {value}")
    if forced_acceptance is not None and forced_acceptance < 0:
        raise EagleError(f"forced_acceptance must be at least 0, not {forced_acceptance}")
    if tree and trees:
        raise EagleError("give --tree for one tree or --trees for several, not both")
    if temperature and temperatures:
        raise EagleError("give --temperature for one or --temperatures for several, not both")
    shapes = parse_trees(trees or tree)
    chosen = parse_engines(engines, own_tree=not shapes and forced_acceptance is None)
    if forced_acceptance is not None and "eagle_auto" in chosen:
        raise EagleError("eagle_auto picks no tree where acceptance is forced; leave it out")
    sweep = Sweep(
        engines=chosen,
        batch_sizes=parse_numbers("batch_sizes", batch_sizes),
        trees=shapes or (None,),
        context_lengths=parse_numbers("context_lengths", context_lengths) or (None,),
        capacities=parse_numbers("capacities", capacities) or (None,),
        temperatures=parse_numbers("temperatures", temperatures, float) or (temperature,),
        forced_acceptance=forced_acceptance,
    )
    if not sweep.groups():
        raise EagleError(f"nothing is left to measure: {' '.join(sweep.notes())}")

    from inference.bench.plots import require_matplotlib, write_plots
    from inference.bench.report import markdown, table
    from inference.generate import load_model, require_writable, write_text
    from records.prompts import load_prompts

    for file in (json, report):
        if file is not None:
            require_writable(Path(file))
    if plots is not None:
        require_matplotlib()
        require_writable(Path(plots) / "plot.png")
    model = load_model(
        base, head, adapter, shapes[0] if shapes else None, dtype, device, quantization=quantization
    )
    if model.drafter is None and any(engine.startswith("eagle") for engine in chosen):
        raise EagleError("no draft head to measure: give --head PATH, or --engines hf,vanilla")
    ids = [p.ids for p in load_prompts(prompts, model.tokenizer, num_prompts)]
    longest = max(n or 0 for n in sweep.context_lengths) + max_new_tokens
    if sweep.context_lengths != (None,) and longest > model.target.max_positions:
        raise EagleError(
            f"a context of {longest - max_new_tokens} and {max_new_tokens} new tokens are more than the "
            f"model's {model.target.max_positions} positions; lower context_lengths or max_new_tokens"
        )
    options = dict(max_new_tokens=max_new_tokens, top_p=top_p, top_k=top_k, seed=seed)
    result = measure(model, ids, sweep, options, repeats, quiet)
    result["command"] = command_line(asked)
    if not quiet:
        print(table(result))
    line = json_module.dumps(result)
    if json is not None:
        write_text(Path(json), line + "\n")
    if report is not None:
        write_text(Path(report), markdown(result))
    if plots is not None:
        write_plots(result, Path(plots))
    print(line)


FLAGS = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}


def parse_engines(text: str | None, own_tree: bool = True) -> list[str]:
    """In the order of ENGINES. own_tree: may eagle_auto be among those that nobody named?"""
    from eagle.errors import EagleError

    if text is None:
        return [e for e in ENGINES if own_tree or e != "eagle_auto"]
    asked = {part.strip() for part in text.split(",")}
    if unknown := sorted(asked - set(ENGINES)):
        raise EagleError(f"unknown engine {', '.join(unknown)!r}; use {', '.join(ENGINES)}")
    return [e for e in ENGINES if e in asked]


def parse_numbers(flag: str, text: str | None, kind: type = int) -> list:
    """ "1,4" -> [1, 4]; counts are at least 1, other numbers at least 0; nothing given is an empty
    list.
    """
    from eagle.errors import EagleError

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
    from eagle.tree import TreeShape

    if text is None:
        return []
    return list(dict.fromkeys(str(TreeShape.parse(part)) for part in text.split(";")))


def command_line(asked: dict) -> str:
    """What to type for the same measurement. Of a path on this machine only the last part is
    told.
    """
    import os
    import shlex

    threads = os.environ.get("OMP_NUM_THREADS")
    words = [
        *([f"OMP_NUM_THREADS={threads}"] if threads else []),
        "python",
        "-m",
        "inference.bench",
    ]
    for name, value in asked.items():
        if value == FLAGS[name] or name in UNREPORTED:
            continue
        words += [f"--{name}", portable(str(value))]
    return shlex.join(words)


def portable(text: str) -> str:
    """Of a path that leads out of the working folder, its last part; anything else as it is."""
    outside = Path(text).is_absolute() or ".." in Path(text).parts or text.startswith("~")
    return Path(text).name if outside else text


def measure(
    model, ids: list[list[int]], sweep: Sweep, options: dict, repeats: int, quiet: bool
) -> dict:
    """The bench's JSON object. options: max_new_tokens, top_p, top_k, seed."""
    import dataclasses

    import torch

    from eagle.loading import fast_bf16
    from inference.bench.environment import describe, load
    from inference.bench.measure import measure_group
    from inference.bench.near_tie import judge_group, overall
    from inference.bench.speedup import against_baselines, headline

    target = model.target
    shape = str(model.drafter.shape) if model.drafter else None
    if sweep.trees == (None,):
        sweep = dataclasses.replace(sweep, trees=(shape,))
    surroundings = describe(target.device)
    say = (lambda text: None) if quiet else lambda text: print(text, file=sys.stderr, flush=True)
    notes = sweep.notes()
    if target.dtype == torch.bfloat16 and not fast_bf16(target.device):
        notes.append("this CPU emulates bf16, slowly: pass --dtype float32")
    for note in notes:
        say(note)
    runs: list[Run] = []
    verdicts: list[dict] = []
    groups = sweep.groups()
    with torch.inference_mode():
        warm_up_s = {}
        for engine in sweep.engines:
            say(f"preparing {engine}")
            warm_up_s[engine] = prepare(model, engine)
        for number, group in enumerate(groups, 1):
            first = group[0]
            prompts = with_context(ids, first.context_length)
            title = f"group {number}/{len(groups)}, batch size {first.batch_size}: "
            found = measure_group(
                model, prompts, group, options, repeats, lambda text, title=title: say(title + text)
            )
            runs += found
            say(title + "comparing outputs")
            verdicts += judge_group(model, prompts, found, options)
    surroundings["load_end"] = load()
    rows = []
    for run, verdict in zip(runs, verdicts, strict=True):
        rows.append({**run.to_json(), **against_baselines(run, runs), **verdict})
    main = first_combination(runs, sweep)
    identical, divergences = overall([rows[runs.index(run)] for run in main])
    return {
        "device": surroundings["accelerator"] or surroundings["cpu"],
        "threads": surroundings["threads"],
        "dtype": str(target.dtype).removeprefix("torch."),
        "versions": surroundings["versions"],
        "environment": surroundings,
        "model": portable(target.name),
        "tree": sweep.trees[0],
        "num_prompts": len(ids),
        "repeats": repeats,
        "max_new_tokens": options["max_new_tokens"],
        "temperature": sweep.temperatures[0],
        "top_p": options["top_p"],
        "top_k": options["top_k"],
        "seed": options["seed"],
        "forced_acceptance": sweep.forced_acceptance,
        "warm_up_s": warm_up_s,
        "notes": notes,
        "runs": rows,
        **headline(main),
        "identical": identical,
        "divergences": divergences,
        "explain": {str(r.case.batch_size): r.explain for r in main if r.explain is not None},
    }


def prepare(model, engine: str) -> dict[str, float]:
    """Compile what the engine needs: seconds a part, {} where nothing is to be done."""
    if engine not in COMPILED:
        return {}
    seconds = model.prepare(compile="max", draft=engine not in PLAIN)
    return {part: round(value, 2) for part, value in seconds.items()}


def first_combination(runs: list[Run], sweep: Sweep) -> list[Run]:
    """The runs that the headline figures are about: the first setting of each sweep, every batch
    size.
    """
    return [
        r
        for r in runs
        if r.case.temperature == sweep.temperatures[0]
        and r.case.context_length == sweep.context_lengths[0]
        and r.case.tree in (None, "auto", sweep.trees[0])
        and (r.case.stock or r.case.capacity == sweep.capacities[0])
    ]
