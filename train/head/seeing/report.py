"""A run's files -> one HTML page that needs nothing else: no network, no scripts.

Knows the files of a run, finished, stopped or killed; knows nothing of the process that wrote them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.meter import clock
from train.head.seeing.svg import bar_chart, line_chart, short
from train.head.seeing.trackers import flat_config

NAME = "report.html"


@dataclass
class RunFiles:
    """rows, perf, events: lines of the .jsonl files. card: run.json. summary: {} while there is
    none.
    """

    folder: Path
    rows: list[dict]
    perf: list[dict]
    events: list[dict]
    config: dict
    card: dict
    summary: dict
    quarantine: Counter = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)  # what could not be read

    @property
    def evaluations(self) -> list[dict]:
        return self.summary.get("evaluations") or self._events("evaluation")

    @property
    def warnings(self) -> list[str]:
        """As they were given, and what the files themselves show."""
        given = [f"step {e['step']}: {e['text']}" for e in self._events("warning")]
        return [*given, *_derived(self), *self.damaged]

    @property
    def starts(self) -> int:
        return len(self._events("start"))

    def _events(self, kind: str) -> list[dict]:
        return [event for event in self.events if event.get("kind") == kind]


def read_run(folder: Path) -> RunFiles:
    """Raises EagleError where `folder` holds no run. A line that a kill tore is left out, and said
    to be.
    """
    if not (folder / "metrics.jsonl").exists() and not (folder / "run.json").exists():
        raise EagleError(
            f"{folder} holds no training run (no metrics.jsonl); give the folder that --output named"
        )
    damaged: list[str] = []
    lines = {
        name: _read_lines(folder / f"{name}.jsonl", damaged)
        for name in ("metrics", "perf", "events", "quarantine")
    }
    reasons = Counter(str(row.get("reason", "unknown reason")) for row in lines["quarantine"])
    return RunFiles(
        folder,
        lines["metrics"],
        lines["perf"],
        lines["events"],
        _read_config(folder, damaged),
        _read_object(folder / "run.json", damaged),
        _read_object(folder / "summary.json", damaged),
        reasons,
        damaged,
    )


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Make the page of the run in `folder`; it appears whole or not at all."""
    out = out or folder / NAME
    atomic_write_text(out, render(read_run(folder)))
    return out


def render(run: RunFiles) -> str:
    sections = [
        ("", _headline(run)),
        ("Warnings", _warnings(run)),
        ("Loss", _loss(run)),
        ("Acceptance", _acceptance(run)),
        ("By source", _by_source(run)),
        ("Evaluations", _evaluations(run)),
        ("Data", _data(run)),
        ("Loss mask", _masks(run)),
        ("Speed and memory", _perf(run)),
        ("Optimisation", _optimisation(run)),
        ("Environment", _environment(run)),
        ("Configuration", _config(run)),
    ]
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{text}</section>"
        for title, text in sections
        if text
    )
    name = escape(run.folder.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>{body}</body></html>\n"
    )


# sections: "" where there is nothing to show


def _headline(run: RunFiles) -> str:
    last = run.rows[-1] if run.rows else {}
    taus = [e["tau"] for e in run.evaluations if "tau" in e]
    if run.summary:
        status = "finished"
    else:
        status = "no summary: still running, stopped, or killed"
    facts: dict[str, Any] = {
        "status": status,
        "steps": run.summary.get("steps", last.get("step", 0)),
        "time": clock(run.summary.get("seconds", last.get("elapsed", 0.0))),
    }
    if len(run.rows) > 1:
        facts["loss"] = f"{run.rows[0]['loss']:.4f} → {last['loss']:.4f}"
    if taus:
        facts["acceptance length τ on held-out prompts"] = " → ".join(
            f"{tau:.3f}" for tau in (taus[0], taus[-1])[: len(taus)]
        )
    if best := run.summary.get("best"):
        facts["best checkpoint"] = best.get("checkpoint")
    if run.starts > 1:
        facts["resumed"] = f"{run.starts - 1} times"
    return table(facts)


def _warnings(run: RunFiles) -> str:
    if not run.warnings:
        return "<p>None.</p>"
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in run.warnings) + "</ul>"


def _derived(run: RunFiles) -> list[str]:
    found = []
    data = run.card.get("data") or run.summary.get("data") or {}
    rows = data.get("rows") or 0
    if rows and data.get("truncated", 0) > 0.1 * rows:
        found.append(
            f"{data['truncated']} of {rows} rows were cut at data.max_length: what lies beyond is not "
            "learnt"
        )
    if data.get("bad"):
        found.append(
            f"{data['bad']} of {data['records']} records were unusable; quarantine.jsonl names each"
        )
    coverage = _vocabulary(run).get("coverage")
    if coverage is not None and coverage < 0.95:
        found.append(
            f"the draft vocabulary holds {coverage:.1%} of the supervised tokens: the head cannot "
            "propose the rest; raise model.draft_vocab_size"
        )
    taus = [e["tau"] for e in run.evaluations if e.get("step") and "tau" in e]
    if len(taus) > 1 and taus[-1] < 0.98 * max(taus):
        found.append(
            f"acceptance length fell from {max(taus):.3f} to {taus[-1]:.3f}: the best checkpoint is an "
            "earlier one"
        )
    return found


def _loss(run: RunFiles) -> str:
    return figures(
        ("loss, weighted sum over depths", line_chart({"loss": curve(run.rows, "loss")})),
        ("loss by depth", line_chart(by_depth(run.rows, "loss_by_depth"))),
    )


def _acceptance(run: RunFiles) -> str:
    held = [
        {"step": e["step"], **_numbered("heldout", e["acceptance_by_depth"])}
        for e in run.evaluations
        if e.get("acceptance_by_depth")
    ]
    names = sorted({key for row in held for key in row if key != "step"}, key=_depth_of)
    tau = {
        "held out, the engine": curve(run.evaluations, "tau"),
        "training rows, simulated": curve(run.rows, "tau_simulated"),
    }
    return figures(
        (
            "conditional acceptance by depth, training rows: right, given that all earlier depths were",
            line_chart(by_depth(run.rows, "acceptance_by_depth")),
        ),
        (
            "accuracy by depth, training rows: right, whatever came before",
            line_chart(by_depth(run.rows, "accuracy_by_depth")),
        ),
        (
            "Σ min(p, q) by depth, training rows: the chance that a sampled token is accepted",
            line_chart(by_depth(run.rows, "overlap_by_depth")),
        ),
        (
            "conditional acceptance by depth, held-out prompts",
            line_chart({f"depth {_depth_of(n)}": curve(held, n) for n in names}, marks=True),
        ),
        (
            "acceptance length τ: tokens a verification",
            line_chart(tau, marks=len(run.evaluations) < 50),
        ),
    )


def _by_source(run: RunFiles) -> str:
    """Curves of whatever rows hold by source: {"sources": {"chat": {"loss": 1.2}}}."""
    charts: dict[str, dict[str, list]] = {}
    for row in run.rows:
        for group in row.values():
            if not isinstance(group, dict):
                continue
            for source, values in group.items():
                if not isinstance(values, dict):
                    continue
                for metric, value in values.items():
                    if isinstance(value, list) and value:
                        metric, value = f"{metric}, depth 1", value[0]
                    if isinstance(value, (int, float)):
                        points = charts.setdefault(metric, {}).setdefault(source, [])
                        points.append((row["step"], value))
    return figures(
        *((f"{m} by source".replace("_", " "), line_chart(c)) for m, c in charts.items())
    )


def _evaluations(run: RunFiles) -> str:
    if not run.evaluations:
        return ""
    head = ["step", "τ", "acceptance by depth", "prompts", "new tokens", "seconds"]
    lines = [
        [
            str(e["step"]),
            f"{e['tau']:.3f}" if "tau" in e else "",
            " ".join(f"{a:.2f}" for a in e.get("acceptance_by_depth", [])),
            str(e.get("prompts", "")),
            str(e.get("new_tokens", "")),
            f"{e['seconds']:.1f}" if "seconds" in e else "",
        ]
        for e in run.evaluations
    ]
    return grid(head, lines)


def _data(run: RunFiles) -> str:
    data = run.card.get("data") or run.summary.get("data") or {}
    parts = [table(flat_config(data))] if data else []
    if run.quarantine:
        parts.append("<h3>Unusable records</h3>")
        parts.append(
            grid(["reason", "records"], [[r, str(n)] for r, n in run.quarantine.most_common()])
        )
    if vocabulary := _vocabulary(run):
        parts.append("<h3>Draft vocabulary</h3>" + table(flat_config(vocabulary)))
    return "".join(parts)


def _masks(run: RunFiles) -> str:
    parts = []
    for source, stats in (run.card.get("masks") or {}).items():
        facts = {k.replace("_", " "): v for k, v in stats.items() if not isinstance(v, dict)}
        spreads = {k: v for k, v in stats.items() if isinstance(v, dict) and v}
        head = ["", "min", "5%", "median", "mean", "95%", "max"]
        lines = [
            [
                k.replace("_", " "),
                *(short(v[q]) for q in ("min", "p5", "median", "mean", "p95", "max")),
            ]
            for k, v in spreads.items()
        ]
        charts = [
            (k.replace("_", " ") + ", rows", bar_chart(v["counts"], v["edges"]))
            for k, v in spreads.items()
        ]
        parts.append(
            f"<h3>{escape(source)}</h3>{table(facts)}{grid(head, lines)}{figures(*charts)}"
        )
    return "".join(parts)


def _perf(run: RunFiles) -> str:
    if not run.perf:
        return figures(("tokens/s", line_chart({"": curve(run.rows, "tokens_per_second")})))
    phases = sorted({name for row in run.perf for name in row["ratio"]} - {"forward"})
    last = run.perf[-1]
    seconds = [
        [name, f"{1e3 * spent:.1f}", f"{last['ratio'][name]:.1%}"]
        for name, spent in last["seconds"].items()
    ]
    share = {n: [(r["step"], r["ratio"].get(n)) for r in run.perf] for n in phases}
    gib = {
        name: [(r["step"], r["memory"][name] / 2**30) for r in run.perf if name in r["memory"]]
        for name in last["memory"]
    }
    return (
        f"<h3>Where a step's time goes, step {last['step']}</h3>"
        + grid(["phase", "ms", "share"], seconds)
        + "<p>forward is target and head together.</p>"
        + figures(
            (
                "tokens/s",
                line_chart(
                    {
                        "all": curve(run.perf, "tokens_per_second"),
                        "supervised": curve(run.perf, "supervised_tokens_per_second"),
                    }
                ),
            ),
            ("share of a step", line_chart(share)),
            (
                "GFLOP/s, counted for the method",
                line_chart({"": curve(run.perf, "gflops_per_second")}),
            ),
            ("model FLOPs utilisation (of bf16 peak)", line_chart({"": curve(run.perf, "mfu")})),
            ("GPU utilisation, %", line_chart({"": curve(run.perf, "gpu_utilization")})),
            ("memory, GiB", line_chart(gib)),
        )
    )


def _optimisation(run: RunFiles) -> str:
    return figures(
        ("learning rate", line_chart({"": curve(run.rows, "lr")})),
        ("gradient norm before clipping", line_chart({"": curve(run.rows, "grad_norm")}, log=True)),
    )


def _environment(run: RunFiles) -> str:
    found = run.card.get("environment")
    return table(flat_config(found)) if found else "<p>Not recorded by this run.</p>"


def _config(run: RunFiles) -> str:
    """What differs from the defaults first; all of it folded away."""
    defaults = flat_config(HeadTrainConfig().model_dump(mode="json"))
    values = flat_config(run.config)
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    return (
        ("<h3>Not the default</h3>" + table(changed) if changed else "<p>All defaults.</p>")
        + f"<details><summary>all settings</summary>{table(values)}</details>"
        if values
        else ""
    )


def _vocabulary(run: RunFiles) -> dict:
    return run.card.get("draft_vocabulary") or run.summary.get("draft_vocabulary") or {}


# building blocks


def curve(rows: list[dict], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def by_depth(rows: list[dict], key: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for depth, value in enumerate(row.get(key) or [], 1):
            series.setdefault(f"depth {depth}", []).append((row["step"], value))
    return series


def _numbered(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name} {n}": value for n, value in enumerate(values, 1)}


def _depth_of(name: str) -> int:
    return int(name.rsplit(" ", 1)[1])


def figures(*named: tuple[str, str]) -> str:
    drawn = [
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for title, svg in named
        if svg
    ]
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def table(facts: dict[str, Any]) -> str:
    lines = [
        f"<tr><th>{escape(str(k))}</th><td>{escape(shown(v))}</td></tr>" for k, v in facts.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def grid(head: list[str], lines: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><tr>{top}</tr>{rows}</table>"


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return str(value)


def _read_lines(path: Path, damaged: list[str]) -> list[dict]:
    """The objects of a .jsonl file, [] where there is none."""
    if not path.exists():
        return []
    found, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    if bad:
        damaged.append(f"{bad} lines of {path.name} cannot be read and are left out")
    return found


def _read_object(path: Path, damaged: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        damaged.append(f"{path.name} cannot be read and is left out")
        return {}
    return value


def _read_config(folder: Path, damaged: list[str]) -> dict:
    import yaml

    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        damaged.append(f"{path.name} cannot be read and is left out")
        return {}
    return value


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; border-bottom: 1px solid var(--line); margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .4rem 0 .8rem; } th { text-align: left; font-weight: 600; }
td, th { padding: .15rem .8rem .15rem 0; vertical-align: top; border-bottom: 1px solid var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: min(560px, 100%); }
figcaption { font-size: .9rem; opacity: .85; } svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; } .grid { stroke: var(--line); stroke-width: 1; }
.legend { margin: 0; font-size: .85rem; } .legend span { margin-right: .9rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; }
li { margin: .2rem 0; }
"""
