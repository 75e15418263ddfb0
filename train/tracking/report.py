"""A run's files -> one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import importlib.util
import io
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import clock
from train.tracking.trackers import flat_config

NAME = "report.html"
Series = dict[str, list[tuple[float, float]]]  # name -> (step, value)


@dataclass
class RunFiles:
    """What a run left, finished, stopped or killed. rows, perf, events: lines of the .jsonl files.
    card: run.json. summary: {} while there is none. damaged: what could not be read."""

    folder: Path
    damaged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not any((self.folder / name).exists() for name in ("metrics.jsonl", "run.json")):
            raise EagleError(
                f"{self.folder} holds no training run (no metrics.jsonl); give the folder that "
                "--output named"
            )
        self.rows, self.perf, self.events = (
            [row for row in self._lines(name) if "step" in row]
            for name in ("metrics", "perf", "events")
        )
        rejected = self._lines("quarantine")
        self.rejected = Counter(str(row.get("reason", "unknown reason")) for row in rejected)
        self.config = self._object("config.yaml", yaml.safe_load)
        self.card = self._object("run.json", json.loads)
        self.summary = self._object("summary.json", json.loads)
        about = {**self.summary, **self.card}
        self.data, self.vocabulary = about.get("data", {}), about.get("draft_vocabulary", {})
        self.evaluations = self.summary.get("evaluations") or self.of_kind("evaluation")
        self.warnings = [f"step {e['step']}: {e['text']}" for e in self.of_kind("warning")]
        self.warnings += [*conclusions(self), *self.damaged]

    def of_kind(self, kind: str) -> list[dict]:
        return [event for event in self.events if event.get("kind") == kind]

    def _lines(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        found = [parsed(line, json.loads) for line in text.splitlines()]
        good = [value for value in found if value is not None]
        if bad := len(found) - len(good):
            self.damaged.append(f"{bad} lines of {path.name} cannot be read and are left out")
        return good

    def _object(self, name: str, parse: Callable[[str], Any]) -> dict:
        path = self.folder / name
        value = parsed(path.read_text(encoding="utf-8"), parse) if path.exists() else {}
        if value is None:
            self.damaged.append(f"{name} cannot be read and is left out")
        return value or {}


def parsed(text: str, parse: Callable[[str], Any]) -> dict | None:
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Make the page of the run in `folder`; it appears whole or not at all."""
    out = out or folder / NAME
    atomic_write_text(out, render(RunFiles(folder)))
    return out


def render(run: RunFiles) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = shown
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    name = run.folder.resolve().name
    return environment.from_string(template).render(name=name, sections=sections(run))


@dataclass
class Section:
    """tables: a dict is two columns, a list of dicts has a header. figures: data URIs."""

    title: str
    tables: dict[str, dict | list[dict]] = field(default_factory=dict)
    figures: dict[str, str | None] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def sections(run: RunFiles) -> list[Section]:
    plots = importlib.util.find_spec("matplotlib") is not None
    draw = plot if plots else lambda *_, **__: None
    said = [] if plots else ["for curves, pip install 'eagle-heads[plots]' and make this page anew"]
    return [
        Section("Run", {"summary": headline(run)}, lines=said),
        Section("Warnings", lines=run.warnings or ["None."]),
        training(run, draw),
        acceptance(run, draw),
        data(run, draw),
        speed(run, draw),
        settings(run),
    ]


def headline(run: RunFiles) -> dict:
    last = run.rows[-1] if run.rows else {}
    taus = [e["tau"] for e in run.evaluations if "tau" in e]
    starts = len(run.of_kind("start"))
    facts = {
        "status": "finished" if run.summary else "no summary: still running, stopped, or killed",
        "steps": run.summary.get("steps", last.get("step", 0)),
        "time": clock(run.summary.get("seconds", last.get("elapsed", 0.0))),
        "loss, first and last": [run.rows[0]["loss"], last["loss"]] if run.rows else None,
        "acceptance length τ on held-out prompts, first and last": [*taus[:1], *taus[1:][-1:]],
        "best checkpoint": run.summary.get("best", {}).get("checkpoint"),
        "resumed": f"{starts - 1} times" if starts > 1 else None,
    }
    return {name: value for name, value in facts.items() if value not in (None, [])}


def conclusions(run: RunFiles) -> list[str]:
    """What the files show and a user should act on."""
    found, about = [], run.data
    if about.get("truncated", 0) > 0.1 * about.get("rows", 0):
        found.append(
            f"{about['truncated']} of {about['rows']} rows were cut at data.max_length: what lies "
            "beyond is not learnt"
        )
    if about.get("bad"):
        found.append(
            f"{about['bad']} of {about['records']} records were unusable; quarantine.jsonl names "
            "each"
        )
    if (coverage := run.vocabulary.get("coverage", 1)) < 0.95:
        found.append(
            f"the draft vocabulary holds {coverage:.1%} of the supervised tokens: the head cannot "
            "propose the rest; raise model.draft_vocab_size"
        )
    taus = [e["tau"] for e in run.evaluations if e.get("step") and "tau" in e]
    if taus and taus[-1] < 0.98 * max(taus):
        found.append(
            f"acceptance length fell from {max(taus):.3f} to {taus[-1]:.3f}: the best checkpoint "
            "is an earlier one"
        )
    return found


def training(run: RunFiles, draw: Callable) -> Section:
    rows = run.rows
    names = ("step", "loss", "tau_simulated", "lr", "grad_norm", "tokens_per_second")
    shown = rows[:: max(1, len(rows) // 10)] + rows[-1:]
    return Section(
        "Training",
        {"steps": [{name: row.get(name) for name in names} for row in shown]},
        {
            "loss, weighted sum over depths": draw(curves(rows, "loss")),
            "loss by depth": draw(curves(rows, "loss_by_depth")),
            "loss by source": draw(by_source(rows, "loss")),
            "learning rate": draw(curves(rows, "lr")),
            "gradient norm before clipping": draw(curves(rows, "grad_norm"), log=True),
        },
    )


def acceptance(run: RunFiles, draw: Callable) -> Section:
    rows, held = run.rows, run.evaluations
    names = ("step", "tau", "acceptance_by_depth", "prompts", "new_tokens", "seconds")
    by_depth = "conditional acceptance by depth: right, given that all earlier depths were"
    tau = {**curves(rows, "tau_simulated"), **curves(held, "tau")}
    return Section(
        "Acceptance",
        {"held-out prompts": [{name: e.get(name) for name in names} for e in held]},
        {
            "acceptance length τ: held out, and simulated on training rows": draw(tau),
            f"held-out prompts, {by_depth}": draw(curves(held, "acceptance_by_depth")),
            f"training rows, {by_depth}": draw(curves(rows, "acceptance_by_depth")),
            "accuracy by depth, training rows": draw(curves(rows, "accuracy_by_depth")),
            "Σ min(p, q) by depth, training rows": draw(curves(rows, "overlap_by_depth")),
            "simulated τ by source": draw(by_source(rows, "tau_simulated")),
        },
    )


def data(run: RunFiles, draw: Callable) -> Section:
    tables: dict = {
        "data": flat_config(run.data),
        "draft vocabulary": flat_config(run.vocabulary),
        "unusable records": [{"reason": r, "records": n} for r, n in run.rejected.most_common()],
    }
    figures = {}
    for source, stats in run.card.get("masks", {}).items():
        spreads = {name: found for name, found in stats.items() if isinstance(found, dict)}
        tables[f"loss mask of {source}"] = {k: v for k, v in stats.items() if k not in spreads}
        tables[f"rows of {source}"] = [
            {"": name, **{k: v for k, v in found.items() if k not in ("counts", "edges")}}
            for name, found in spreads.items()
            if found
        ]
        for name, found in spreads.items():
            if found:
                title = f"{source}: {name.replace('_', ' ')}, rows"
                figures[title] = draw({}, bars=(found["counts"], found["edges"]))
    return Section("Data", tables, figures)


def speed(run: RunFiles, draw: Callable) -> Section:
    last = run.perf[-1] if run.perf else {"seconds": {}}
    phases = [
        {"phase": name, "ms": 1e3 * spent, "share": last["ratio"][name]}
        for name, spent in last["seconds"].items()
    ]
    rates = curves(run.perf or run.rows, "tokens_per_second")
    return Section(
        "Speed and memory",
        {"where the time of the last such step goes": phases},
        {
            "tokens/s": draw({**rates, **curves(run.perf, "supervised_tokens_per_second")}),
            "share of a step": draw(curves(run.perf, "ratio")),
            "model FLOPs utilisation": draw(curves(run.perf, "mfu")),
            "memory, bytes": draw(curves(run.perf, "memory")),
        },
    )


def settings(run: RunFiles) -> Section:
    defaults = flat_config(HeadTrainConfig().model_dump(mode="json"))
    values = flat_config(run.config)
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    environment = flat_config(run.card.get("environment", {}))
    tables = {"settings that are not the default": changed, "environment": environment}
    return Section("Settings", {**tables, "all settings": values})


def curves(rows: list[dict], key: str) -> Series:
    """The values of a key over the steps; of a list by depth, of a dict by name."""
    series: Series = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, list):
            value = {f"depth {n}": item for n, item in enumerate(value, 1)}
        for name, number in (value if isinstance(value, dict) else {key: value}).items():
            if isinstance(number, (int, float)):
                series.setdefault(name, []).append((row["step"], number))
    return series


def by_source(rows: list[dict], key: str) -> Series:
    """The same of a mixture: {"sources": {"chat": {"loss": 1.2}}}."""
    found = [
        {"step": row["step"], key: {name: of.get(key) for name, of in row["sources"].items()}}
        for row in rows
        if row.get("sources")
    ]
    return curves(found, key)


def plot(series: Series, log: bool = False, bars: tuple | None = None) -> str | None:
    """Curves, or a histogram of (counts, edges), as a data URI; None where there is nothing."""
    if not series and bars is None:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 2.6), layout="tight")
    axes = figure.subplots()
    if bars is not None:
        axes.stairs(*bars, fill=True)
    for name, points in series.items():
        dots = "." if len(points) < 50 else None
        axes.plot(*zip(*points, strict=True), marker=dots, linewidth=1, label=name)
    if len(series) > 1:
        axes.legend(fontsize="x-small")
    axes.set_yscale("log" if log else "linear")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "eagle"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(image.getvalue()).decode()}"


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
