"""Curves and histograms as inline SVG. Knows numbers and names; knows nothing of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 10, 30
MOST = 400  # points of a curve; more are averaged in neighbouring groups
# distinguishable in order, also for most colour-blind readers (Okabe and Ito 2008)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800")


def line_chart(series: dict[str, Points], *, log: bool = False, marks: bool = False) -> str:
    """Named (x, y) points -> one <svg> with axes and, for several names, a legend; "" without any
    point.

    log: a logarithmic y axis, where all values are positive. marks: dots at the points.
    """
    clean = {name: thin(finite(points)) for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return ""
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    log = log and min(ys) > 0
    scale = math.log10 if log else float
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(scale(min(ys)), scale(max(ys)))
    place = Frame(x_ticks, y_ticks)
    parts = [place.axes([short(x) for x in x_ticks], [short(10**y if log else y) for y in y_ticks])]
    for n, (name, points) in enumerate(clean.items()):
        colour = COLOURS[n % len(COLOURS)]
        at = [(place.x(x), place.y(scale(y))) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}">'
            f"<title>{escape(name)}</title></polyline>"
        )
        if marks or len(at) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"><title>{escape(name)}: '
                f"{short(v)} at {short(u)}</title></circle>"
                for (x, y), (u, v) in zip(at, points, strict=True)
            ]
    return _svg(parts) + (legend(list(clean)) if len(clean) > 1 else "")


def bar_chart(counts: Sequence[float], edges: Sequence[float]) -> str:
    """A histogram: counts[i] between edges[i] and edges[i + 1]."""
    if not counts or not max(counts):
        return ""
    x_ticks, y_ticks = ticks(edges[0], edges[-1]), ticks(0, max(counts))
    place = Frame(x_ticks, y_ticks)
    parts = [place.axes([short(x) for x in x_ticks], [short(y) for y in y_ticks])]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        x, width, y = place.x(low), place.x(high) - place.x(low), place.y(count)
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{place.y(0) - y:.1f}" fill="{COLOURS[0]}"><title>{short(low)} … {short(high)}: '
            f"{short(count)}</title></rect>"
        )
    return _svg(parts)


class Frame:
    """Data coordinates -> pixels, over the range of the ticks."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def axes(self, x_names: list[str], y_names: list[str]) -> str:
        parts = []
        for value, name in zip(self.y_ticks, y_names, strict=True):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            )
        for value, name in zip(self.x_ticks, x_names, strict=True):
            x = self.x(value)
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'
            )
        return "".join(parts)


def legend(names: list[str]) -> str:
    items = [
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def finite(points: Points) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST points: means of neighbouring groups of one size."""
    size = -(-len(points) // MOST)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def short(value: float) -> str:
    """A number for a label: 12000 -> 12k, 0.00031 -> 3.1e-04."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / scale:.4g}{unit}"
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def _svg(parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
