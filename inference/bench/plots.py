"""The bench's JSON as PNG files, one for each question that it has data for."""

from __future__ import annotations

import os
from pathlib import Path

from inference.bench.report import SETTINGS, varied


def require_matplotlib() -> None:
    from eagle.errors import EagleError

    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EagleError("plots need matplotlib: pip install 'eagle-heads[plots]'") from error


def write_plots(result: dict, folder: Path) -> list[Path]:
    """The files written, each whole or not at all."""
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        if not draw(result, axes):
            continue
        axes.set_title(f"{result['model']}, {result['dtype']}, {result['device']}", fontsize=9)
        figure.legend(fontsize=7, loc="outside right upper")
        path = folder / f"{name}.png"
        part = path.with_name(path.name + ".part")
        figure.savefig(part, format="png", dpi=120)
        os.replace(part, path)
        written.append(path)
    return written


def label(result: dict, run: dict, without: str = "") -> str:
    """The engine and the settings in which runs differ: "eagle, batch 8, tree 16,4,4"."""
    names = [*(["batch_size"] if len({r["batch_size"] for r in result["runs"]}) > 1 else [])]
    names += varied(result)
    words = {**SETTINGS, "batch_size": "batch"}
    told = [f"{words[n]} {run[n]}" for n in names if n != without and run[n] is not None]
    return ", ".join([run["engine"], *told])


def draw_curves(result: dict, axes, x: str, y: str, runs: list[dict]) -> bool:
    """A curve for all runs that differ in `x` alone; single points are left out."""
    curves: dict[str, list[tuple]] = {}
    for run in runs:
        if run[x] is not None and run[y] is not None:
            curves.setdefault(label(result, run, without=x), []).append((run[x], run[y]))
    curves = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(sorted({place for points in curves.values() for place, _ in points}))
    axes.set_ylim(bottom=0)
    return bool(curves)


def speedup_by_batch(result: dict, axes) -> bool:
    runs = [run for run in result["runs"] if run["engine"] != "hf"]
    drawn = draw_curves(result, axes, "batch_size", "vs_hf", runs)
    axes.axhline(1.0, color="grey", linewidth=0.8, label="hf")
    axes.set_xlabel("batch size")
    axes.set_ylabel("speedup over stock generate")
    return drawn


def cost_by_context(result: dict, axes) -> bool:
    axes.set_xlabel("tokens of prompt")
    axes.set_ylabel("milliseconds a cycle")
    return draw_curves(result, axes, "context_length", "cycle_ms", result["runs"])


def acceptance_by_depth(result: dict, axes) -> bool:
    runs = [
        r for r in result["runs"] if r["engine"].startswith("eagle") and r["acceptance_by_depth"]
    ]
    for run in runs:
        rates = run["acceptance_by_depth"]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", label=label(result, run))
    axes.set_xticks(range(1, 1 + max((len(r["acceptance_by_depth"]) for r in runs), default=0)))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("depth")
    axes.set_ylabel("conditional acceptance rate")
    return bool(runs)


def cycle_breakdown(result: dict, axes) -> bool:
    runs = [run for run in result["runs"] if run["cycle_ms"] is not None]
    places, left = range(len(runs)), [0.0] * len(runs)
    for phase in ("draft", "verify", "commit"):
        widths = [run[f"{phase}_ms"] for run in runs]
        axes.barh(places, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [label(result, run) for run in runs], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a cycle")
    return bool(runs)


PLOTS = {
    "speedup_by_batch": speedup_by_batch,
    "acceptance_by_depth": acceptance_by_depth,
    "cycle_breakdown": cycle_breakdown,
    "cost_by_context": cost_by_context,
}
