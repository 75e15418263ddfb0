"""What the engines' JSON says, as tables."""

from __future__ import annotations

from inference.bench.report import Section, show, tabulate

# settings of a run that are shown where the runs differ in them
SETTINGS = {"temp": "temperature", "context": "context_length", "capacity": "capacity"}
SETTINGS |= {"tree": "tree", "forced": "forced_acceptance"}


def title(result: dict) -> str:
    return (
        f"{result['model']} on {result['device']} ({result['threads']} threads, "
        f"{result['dtype']}), tree {result['tree']}, temperature {result['temperature']}, "
        f"{result['num_prompts']} prompts"
    )


def varied(result: dict) -> dict[str, str]:
    """The settings in which runs differ, or which one of them alone has set."""
    found = {}
    for name, setting in SETTINGS.items():
        values = {run[setting] for run in result["runs"]} - {None, "auto"}
        if len(values) > 1 or (values and name in ("capacity", "context")):
            found[name] = setting
    return found


def sections(result: dict) -> list[Section]:
    own = {"batch": "batch_size", **varied(result), "engine": "engine"}
    runs = [readable(run) for run in result["runs"]]
    speed = {
        "tokens/s": "tokens_per_second:.1f",
        "tau": "drafted:.2f",
        "vs_hf": "vs_hf_shown",
        "vs_best_vanilla": "vs_best_vanilla_shown",
        "cycle_ms": "cycle_ms:.2f",
        "identical": "same",
        "looping": "looping:.0%",
    }
    phases = {p: f"{p}_ms:.2f" for p in ("draft", "verify", "commit", "cycle", "prefill")}
    phases["peak memory MB"] = "peak_memory_mb:.1f"
    pairs = []
    for run in runs:
        for other, counts in (run["divergences"] or {}).items():
            pairs.append({**run, "against": other, **counts})
    counted = {"rows that differ": "rows", "near ties": "near_ties", "real": "real"}
    sizes = list(dict.fromkeys(str(run["batch_size"]) for run in runs))
    ratios = [["ratio", *(f"batch {size}" for size in sizes)]]
    efficiency = {name: result[name] for name in ("efficiency", "efficiency_best")}
    for name, values in {**result["speedup"], **efficiency}.items():
        ratios.append([f"`{name}`", *(show(values.get(size), ".2f") for size in sizes)])
    ms = "Milliseconds; prefill is per batch of prompts."
    return [
        Section("Throughput", tabulate(runs, **own, **speed), "\n".join(result["notes"])),
        Section("Ratios", ratios, "Efficiency is a ratio over tau."),
        Section("Where a cycle's time goes", tabulate(runs, **own, **phases), ms),
        Section("Divergences", tabulate(pairs, **own, against="against", **counted)),
        *(
            Section(f"Tree chosen at batch size {size}", [], f"```\n{text.strip()}\n```")
            for size, text in result["explain"].items()
        ),
    ]


def readable(run: dict) -> dict:
    """A run with what the throughput table shows of it: tau where it drafts, ratios with their 95%
    intervals, the verdict with its near ties."""
    shown = {"drafted": run["tau"] if run["engine"].startswith("eagle") else None}
    for name in ("vs_hf", "vs_best_vanilla"):
        low_high = run[f"{name}_ci95"]
        ends = " [{:.2f}, {:.2f}]".format(*low_high) if low_high else ""
        shown[f"{name}_shown"] = show(run[name], ".2f") + ends
    ties = sum(counts["near_ties"] for counts in (run["divergences"] or {}).values())
    same = {True: "yes", False: "NO", None: ""}[run["identical"]]
    return {**run, **shown, "same": f"{same} ({ties})" if same and ties else same}
