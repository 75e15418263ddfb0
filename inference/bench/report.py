"""Tables for people, in a terminal and on a Markdown page, made from a record's JSON; and how sure
a figure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Lines = list[list[str]]
RESAMPLES = 2000


@dataclass
class Section:
    """A table whose first line is its header, and what to say about it."""

    title: str
    lines: Lines
    note: str = ""


def show(value, form: str) -> str:
    return format(value, form) if value is not None else ""


def tabulate(runs: list[dict], **columns: str) -> Lines:
    """columns: title -> "field" or "field:format"; runs that lack a field leave the cell empty."""
    fields = [column.partition(":")[::2] for column in columns.values()]
    head = [title.replace("_", " ") for title in columns]
    return [head, *([show(run.get(name), form) for name, form in fields] for run in runs)]


def grid(lines: Lines) -> str:
    """A Markdown table; the first line is its header."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def terminal(title: str, section: Section) -> str:
    """Numbers to the right, words to the left."""
    columns = []
    for column in zip(*section.lines, strict=True):
        words, width = any(cell[:1].isalpha() for cell in column[1:]), max(map(len, column))
        columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join(filter(None, [title, *lines, section.note]))


def markdown(title: str, result: dict, sections: list[Section]) -> str:
    facts = [["what", "value"], ["model", title]]
    facts += [[name.replace("_", " "), str(v)] for name, v in result["environment"].items()]
    parts = ["# Benchmark", grid(facts)]
    for section in sections:
        parts += [f"## {section.title}", grid(section.lines) if section.lines else "", section.note]
    parts += ["## Reproduce", f"```bash\n{result['command']}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def bootstrap(of: Callable[[np.ndarray], float], count: int, seed: int = 0) -> list[float]:
    """95% percentile-bootstrap interval, [low, high], of a figure of `count` things: `of(places)`
    is the figure of those at `places`, drawn with replacement."""
    rng = np.random.default_rng(seed)
    # one resample at a time: a large set times all resamples would not fit in memory
    found = [of(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    return np.percentile(found, [2.5, 97.5]).tolist()
