"""The bench's JSON for people: a table and a Markdown page.

Knows the JSON alone, so that a kept result can be shown again.
"""

from __future__ import annotations

# settings of a run that are shown where the runs differ in them
SETTINGS = {
    "temperature": "temp",
    "context_length": "context",
    "capacity": "capacity",
    "tree": "tree",
    "forced_acceptance": "forced",
}


def show(value, form: str) -> str:
    return format(value, form) if value is not None else ""


def varied(result: dict) -> list[str]:
    """The settings in which runs differ, or which one of them alone has set."""
    found = []
    for name in SETTINGS:
        values = {run[name] for run in result["runs"]} - {None, "auto"}
        if len(values) > 1 or (values and name in ("capacity", "context_length")):
            found.append(name)
    return found


def settings_of(run: dict, names: list[str]) -> list[str]:
    return ["" if run[name] is None else str(run[name]) for name in names]


def columns(result: dict, intervals: bool) -> list[list[str]]:
    """Header and one line a run."""
    extra = varied(result)
    lines = [
        [
            "batch",
            *(SETTINGS[n] for n in extra),
            "engine",
            "tokens/s",
            "tau",
            "vs hf",
            "vs best vanilla",
            "cycle ms",
            "identical",
            "looping",
        ]
    ]
    for run in result["runs"]:
        drafts = run["engine"].startswith("eagle")
        ratios = []
        for name in ("vs_hf", "vs_best_vanilla"):
            text = show(run[name], ".2f")
            if intervals and run[f"{name}_ci95"]:
                text += " [{:.2f}, {:.2f}]".format(*run[f"{name}_ci95"])
            ratios.append(text)
        same = {True: "yes", False: "NO", None: ""}[run["identical"]]
        ties = sum(counts["near_ties"] for counts in (run["divergences"] or {}).values())
        lines.append(
            [
                str(run["batch_size"]),
                *settings_of(run, extra),
                run["engine"],
                show(run["tokens_per_second"], ".1f"),
                show(run["tau"] if drafts else None, ".2f"),
                *ratios,
                show(run["cycle_ms"], ".2f"),
                f"{same} ({ties})" if same and ties else same,
                show(run["looping"], ".0%"),
            ]
        )
    return lines


def table(result: dict) -> str:
    """For a terminal."""
    title = (
        f"{result['model']} on {result['device']} ({result['threads']} threads, {result['dtype']}), "
        f"tree {result['tree']}, temperature {result['temperature']}, {result['num_prompts']} prompts"
    )
    lines = columns(result, intervals=False)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = lines[0].index("engine")
    shown = [
        "  ".join(
            cell.ljust(width) if place == words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *shown, *result["notes"]])


def grid(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its header."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def markdown(result: dict) -> str:
    where = result["environment"]
    facts = [
        ["what", "value"],
        ["model", f"{result['model']}, {result['dtype']}, tree {result['tree']}"],
        ["device", result["device"]],
        ["cpu", f"{where['cpu']}, {where['usable_cores']} of {where['cores']} cores usable"],
        ["instruction sets", " ".join(where["isa"]) or "none of those that matter"],
        ["threads", f"{where['threads']}, OMP_NUM_THREADS {where['omp_num_threads'] or 'not set'}"],
        ["versions", ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)],
        ["load average", f"{where['load_start']} at the start, {where['load_end']} at the end"],
        ["commit, date", f"{where['git_commit'] or 'no checkout'}, {where['date']}"],
    ]
    sampling = {k: result[k] for k in ("top_p", "top_k", "seed")}
    parts = [
        "# Benchmark",
        grid(facts),
        "## Throughput",
        f"{result['num_prompts']} prompts, up to {result['max_new_tokens']} new tokens, medians of "
        f"{result['repeats']} repeats, interleaved; temperature {result['temperature']}, "
        + ", ".join(f"{k} {v}" for k, v in sampling.items())
        + ". Prompt processing is included.",
        grid(columns(result, intervals=True)),
        "Brackets after a ratio: 95% bootstrap interval over batches of prompts. After `identical`: first "
        "divergences from plain engines that replay shows to be near ties; `NO`: one of them is not. `vs "
        "best vanilla`: over the fastest engine of ours that does not draft. `looping`: generations that "
        "end in a loop, which flatters tau.",
        *result["notes"],
        "## Ratios",
        grid(ratio_lines(result)),
        "`vs_*`: see the names; `best_*` take the fastest engine that drafts. Efficiency is a ratio over tau: 1 "
        "would be a cycle as cheap as the plain step it is measured against.",
        "## Where a cycle's time goes",
        grid(phase_lines(result)),
        "Milliseconds; prefill is per batch of prompts. Memory: on a CPU growth of the resident set during a "
        "run, on a GPU what was allocated at the most, weights included.",
        "## Divergences",
        grid(divergence_lines(result)),
    ]
    if any(result["warm_up_s"].values()):
        lines = [["engine", "part", "seconds"]]
        for engine, seconds in result["warm_up_s"].items():
            lines += [[engine, part, f"{value:.1f}"] for part, value in seconds.items()]
        parts += ["## Compiling", grid(lines), "Not part of the times above."]
    for size, text in result["explain"].items():
        parts += [f"## Tree chosen at batch size {size}", f"```\n{text.strip()}\n```"]
    parts += ["## Reproduce", f"```bash\n{result['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def ratio_lines(result: dict) -> list[list[str]]:
    named = {
        **result["speedup"],
        "efficiency": result["efficiency"],
        "efficiency_best": result["efficiency_best"],
    }
    sizes = list(dict.fromkeys(str(run["batch_size"]) for run in result["runs"]))
    lines = [["ratio", *(f"batch {size}" for size in sizes)]]
    for name, values in named.items():
        lines.append([f"`{name}`", *(show(values.get(size), ".2f") for size in sizes)])
    return lines


def phase_lines(result: dict) -> list[list[str]]:
    extra = varied(result)
    phases = ("draft_ms", "verify_ms", "commit_ms", "cycle_ms", "prefill_ms")
    head = ["batch", *(SETTINGS[n] for n in extra), "engine"]
    lines = [[*head, *(p.removesuffix("_ms") for p in phases), "peak memory MB"]]
    for run in result["runs"]:
        lines.append(
            [
                str(run["batch_size"]),
                *settings_of(run, extra),
                run["engine"],
                *(show(run[p], ".2f") for p in phases),
                show(run["peak_memory_mb"], ".1f"),
            ]
        )
    return lines


def divergence_lines(result: dict) -> list[list[str]]:
    extra = varied(result)
    lines = [
        [
            "batch",
            *(SETTINGS[n] for n in extra),
            "engine",
            "against",
            "rows that differ",
            "near ties",
            "real",
        ]
    ]
    for run in result["runs"]:
        for other, counts in (run["divergences"] or {}).items():
            lines.append(
                [
                    str(run["batch_size"]),
                    *settings_of(run, extra),
                    run["engine"],
                    other,
                    *(str(counts[k]) for k in ("rows", "near_ties", "real")),
                ]
            )
    return lines
