"""A run's files -> one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import clock
from train.tracking.trackers import flat_config

Series = dict[str, list[tuple[float, float]]]  # name -> (step, value)


class RunFiles:
    """What a run left, finished, stopped or killed. card: run.json. summary: {} while there is
    none."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in ("metrics.jsonl", "run.json")):
            raise EagleError(f"{folder} holds no training run; give the folder that --output named")
        self.folder, self.damaged = folder, []
        self.rows, self.perf, self.events, rejected = (
            self._read(f"{name}.jsonl", json.loads, lines=True)
            for name in ("metrics", "perf", "events", "quarantine")
        )
        self.rejected = Counter(str(row.get("reason")) for row in rejected).most_common()
        [self.config] = self._read("config.yaml", yaml.safe_load) or [{}]
        [self.card] = self._read("run.json", json.loads) or [{}]
        [self.summary] = self._read("summary.json", json.loads) or [{}]
        about = {**self.summary, **self.card}
        self.data, self.vocabulary = about.get("data", {}), about.get("draft_vocabulary", {})
        self.evaluations = self.summary.get("evaluations") or self.of_kind("evaluation")
        self.warnings = [f"step {e['step']}: {e['text']}" for e in self.of_kind("warning")]
        self.warnings += [*conclusions(self), *self.damaged]

    def of_kind(self, kind: str) -> list[dict]:
        return [event for event in self.events if event.get("kind") == kind]

    def _read(self, name: str, parse: Callable[[str], Any], lines: bool = False) -> list[dict]:
        """The objects in a file; what a kill tore is left out, and said to be."""
        path = self.folder / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
        found, bad = [], 0
        for part in text.splitlines() if lines else [text]:
            try:
                value = parse(part)
            except (ValueError, yaml.YAMLError):
                value = None
            found += [value] if isinstance(value, dict) else []
            bad += not isinstance(value, dict)
        if bad:
            what = f"{bad} lines of {name}" if lines else name
            self.damaged.append(f"{what} cannot be read: left out")
        return found


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Make the page of the run in `folder`; it appears whole or not at all."""
    out = out or folder / "report.html"
    atomic_write_text(out, render(RunFiles(folder)))
    return out


def render(run: RunFiles) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["shown"] = shown
    page = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    figures = draw(run) if find_spec("matplotlib") else {}
    about = {"name": run.folder.resolve().name, "warnings": run.warnings}
    return page.render(**about, tables=tables(run), figures=figures)


def conclusions(run: RunFiles) -> list[str]:
    """What the files show and a user should act on."""
    found, data = [], run.data
    if data.get("truncated", 0) > 0.1 * data.get("rows", 0):
        of = f"{data['truncated']} of {data['rows']} rows"
        found.append(f"{of} were cut at data.max_length: what lies beyond is not learnt")
    if data.get("bad"):
        of = f"{data['bad']} of {data['records']} records"
        found.append(f"{of} were unusable; quarantine.jsonl names each")
    if (coverage := run.vocabulary.get("coverage", 1)) < 0.95:
        text = f"the draft vocabulary holds {coverage:.1%} of the supervised tokens"
        found.append(f"{text}: the head cannot propose the rest; raise model.draft_vocab_size")
    taus = [e["tau"] for e in run.evaluations if e.get("step") and "tau" in e]
    if taus and taus[-1] < 0.98 * max(taus):
        fell = f"acceptance length fell from {max(taus):.3f} to {taus[-1]:.3f}"
        found.append(f"{fell}: the best checkpoint is an earlier one")
    return found


def tables(run: RunFiles) -> dict[str, dict | list[dict]]:
    """A dict has two columns, a list of dicts a header."""
    defaults = flat_config(HeadTrainConfig().model_dump(mode="json"))
    settings = flat_config(run.config)
    some = run.rows[:: max(1, len(run.rows) // 10)] + run.rows[-1:]
    metrics = ("step", "loss", "tau_simulated", "lr", "grad_norm", "tokens_per_second")
    held = ("step", "tau", "acceptance_by_depth", "prompts", "new_tokens", "seconds")
    masks = run.card.get("masks", {})
    return {
        "run": headline(run),
        "held-out prompts": [{k: e.get(k) for k in held} for e in run.evaluations],
        "steps": [{k: row.get(k) for k in metrics} for row in some],
        "data": flat_config(run.data),
        "draft vocabulary": flat_config(run.vocabulary),
        "unusable records": dict(run.rejected),
        **{f"loss mask of {name}": flat_config(stats) for name, stats in masks.items()},
        "settings that are not the default": {
            k: v for k, v in settings.items() if k not in defaults or defaults[k] != v
        },
        "environment": flat_config(run.card.get("environment", {})),
        "all settings": settings,
    }


def headline(run: RunFiles) -> dict:
    last = run.rows[-1] if run.rows else {}
    taus = [e["tau"] for e in run.evaluations if "tau" in e]
    return {
        "status": "finished" if run.summary else "no summary: still running, stopped, or killed",
        "steps": run.summary.get("steps", last.get("step", 0)),
        "time": clock(run.summary.get("seconds", last.get("elapsed", 0.0))),
        "loss, first and last": [row["loss"] for row in run.rows[:1] + run.rows[-1:]],
        "acceptance length τ on held-out prompts": taus[:1] + taus[1:][-1:],
        "best checkpoint": run.summary.get("best", {}).get("checkpoint"),
        "starts": len(run.of_kind("start")),
    }


def draw(run: RunFiles) -> dict[str, str]:
    """Title -> image, as a data URI."""
    rows, perf, held = run.rows, run.perf, run.evaluations
    by_depth = "conditional acceptance by depth: right, given that all earlier depths were"
    curves = {
        "loss, weighted sum over depths": values(rows, "loss"),
        "loss by depth": values(rows, "loss_by_depth"),
        "loss by source": values(rows, "sources", "loss"),
        "acceptance length τ": values(held, "tau") | values(rows, "tau_simulated"),
        "simulated τ by source": values(rows, "sources", "tau_simulated"),
        f"held-out prompts, {by_depth}": values(held, "acceptance_by_depth"),
        f"training rows, {by_depth}": values(rows, "acceptance_by_depth"),
        "Σ min(p, q) by depth, training rows": values(rows, "overlap_by_depth"),
        "learning rate": values(rows, "lr"),
        "gradient norm before clipping": values(rows, "grad_norm"),
        "tokens/s": values(perf or rows, "tokens_per_second"),
        "seconds of a step": values(perf, "seconds"),
        "memory, bytes": values(perf, "memory"),
    }
    return {title: plot(series) for title, series in curves.items() if series}


def values(rows: list[dict], key: str, of: str | None = None) -> Series:
    """What stands under a key over the steps; of a list by depth, of a dict by name, there `of`
    each where that is given."""
    series: Series = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, list):
            value = {f"depth {n}": item for n, item in enumerate(value, 1)}
        for name, number in (value if isinstance(value, dict) else {key: value}).items():
            number = number.get(of) if of and isinstance(number, dict) else number
            if isinstance(number, (int, float)):
                series.setdefault(name, []).append((row["step"], number))
    return series


def plot(series: Series) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    edges = {"left": 0.12, "right": 0.98, "bottom": 0.11, "top": 0.96}
    axes = Figure(figsize=(5.6, 2.6)).subplots(gridspec_kw=edges)
    for name, points in series.items():
        dots = "." if len(points) < 50 else None
        axes.plot(*zip(*points, strict=True), marker=dots, linewidth=1, label=name)
    if len(series) > 1:
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        axes.figure.savefig(image, format="svg")
    return f"data:image/svg+xml;base64,{b64encode(image.getvalue()).decode()}"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
