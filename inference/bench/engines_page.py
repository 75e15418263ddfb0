"""What the engines' JSON says, as tables and as plots."""

from __future__ import annotations

from pathlib import Path

from eagle.errors import EagleError
from inference.bench.report import Section, show, tabulate
from inference.generate import require_writable

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


def require_matplotlib(folder: Path) -> None:
    """Refuse before the work."""
    require_writable(folder / "plot.png")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EagleError("plots need matplotlib: pip install 'eagle-heads[plots]'") from error


def write_plots(result: dict, folder: Path) -> None:
    """A PNG file for each question that there is data for."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, below, beside, *words) in PLOTS.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        if not draw(result, axes, *words):
            continue
        axes.set(xlabel=below, ylabel=beside)
        axes.set_title(f"{result['model']}, {result['dtype']}, {result['device']}", fontsize=9)
        figure.legend(fontsize=7, loc="outside right upper")
        figure.savefig(folder / f"{name}.png", dpi=120)


def label(result: dict, run: dict, without: str = "") -> str:
    """The engine and the settings in which runs differ: "eagle, batch 8, tree 16,4,4"."""
    names = {**varied(result), "batch": "batch_size"}
    told = [f"{n} {run[s]}" for n, s in names.items() if s != without and run[s] is not None]
    return ", ".join([run["engine"], *told])


def curves(result: dict, axes, x: str, y: str) -> bool:
    """A curve for all runs that differ in `x` alone; single points are left out."""
    found: dict[str, list[tuple]] = {}
    for run in result["runs"]:
        if run[x] is not None and run[y] is not None:
            found.setdefault(label(result, run, without=x), []).append((run[x], run[y]))
    found = {name: sorted(points) for name, points in found.items() if len(points) > 1}
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(sorted({place for points in found.values() for place, _ in points}))
    axes.set_ylim(0, None)
    return bool(found)


def acceptance(result: dict, axes) -> bool:
    runs = [run for run in result["runs"] if run["acceptance_by_depth"]]
    for run in runs:
        rates = run["acceptance_by_depth"]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", label=label(result, run))
    axes.set_ylim(0, 1.02)
    return bool(runs)


PLOTS = {
    "speedup_by_batch": (curves, "batch size", "speedup over stock", "batch_size", "vs_hf"),
    "acceptance_by_depth": (acceptance, "depth", "conditional acceptance rate"),
    "cost_by_context": (curves, "context", "milliseconds a cycle", "context_length", "cycle_ms"),
}
