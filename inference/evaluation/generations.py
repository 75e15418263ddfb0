"""Completions of problems: how they are drawn, what is kept of them, and files of them, ours and
upstream's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from eagle.errors import EagleError
from eagle.files import atomic_write_text

from . import journal
from .problem import Problem, ProblemSet, cut, fenced, some
from .rows import reason

TOO_LONG = "prompt_too_long"


class Sampling(BaseModel):
    """engine: "eagle" drafts, "vanilla" does not. chat: through the chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine: Literal["auto", "eagle", "vanilla"] = "auto"
    temperature: float = Field(0.2, ge=0)
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = Field(512, ge=1)
    seed: int = 0
    tree: str | None = None
    compile: str = "auto"
    chat: bool = False


@dataclass
class Sample:
    """One completion. finish_reason: the engine's, or TOO_LONG; None where a file does not tell.
    cycles: verifications. chat: the answer of a chat, with the program in a fenced block."""

    task_id: str
    sample: int
    output: str
    seed: int | None = None
    new_tokens: int | None = None
    cycles: int | None = None
    finish_reason: str | None = None
    key: str | None = None
    chat: bool | None = None

    @property
    def name(self) -> tuple[str, int]:
        return self.task_id, self.sample

    def record(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v is not None}


def sample_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of one completion: of nothing else in the run, so that neither order, batch nor the
    other problems change it. 0 … 2^63 - 1."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Generations:
    """settings: of our journals; sessions: what was timed."""

    samples: list[Sample]
    settings: dict | None = None
    sessions: Sequence[dict] = ()

    def by_task(self) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {}
        for sample in sorted(self.samples, key=lambda s: s.sample):
            found.setdefault(sample.task_id, []).append(sample)
        return found

    def speed(self) -> dict:
        """new_tokens, cycles and tau of all completions; seconds and the two rates of the sessions
        that ran to their end, None where none did."""
        made = [s for s in self.samples if s.cycles]
        cycles = sum(s.cycles for s in made)
        names = ("samples", "new_tokens", "seconds")
        timed = {name: sum(session[name] for session in self.sessions) for name in names}
        seconds = timed["seconds"]
        return {
            "samples": len(self.samples),
            "new_tokens": sum(s.new_tokens or 0 for s in self.samples),
            "cycles": cycles,
            "tau": round(sum(s.new_tokens - 1 for s in made) / cycles, 3) if cycles else None,
            "seconds": round(seconds, 3),
            "timed_samples": timed["samples"],
            "tokens_per_second": round(timed["new_tokens"] / seconds, 2) if seconds else None,
            "samples_per_second": round(timed["samples"] / seconds, 3) if seconds else None,
        }


def from_records(records: list[dict], where: Path) -> Generations:
    """The lines of one of our journals."""
    found = Generations([], None, [])
    for record in records:
        if "settings" in record:
            found.settings = record["settings"]
        elif "session" in record:
            found.sessions.append(record["session"])
        elif {"task_id", "sample", "output"} <= record.keys() <= set(Sample.__dataclass_fields__):
            found.samples.append(Sample(**record))
        else:
            raise EagleError(f"{where} holds {some(list(record))}: no journal of completions")
    return found


def read_generations(path: str | Path, problems: ProblemSet) -> Generations:
    """A journal of ours (.jsonl), or upstream's [{"task_id", "prompt", "output": [...]}] (.json).

    Raises EagleError for completions of problems that `problems` does not have, for duplicates and
    bad rows."""
    path = Path(path)
    if path.suffix == ".jsonl":
        found = from_records(journal.read(path), path)
    else:
        found = Generations(read_upstream(path))
    if not found.samples:
        raise EagleError(f"{path} holds no completions; run the generate stage first")
    unknown = sorted({s.task_id for s in found.samples} - problems.by_id.keys())
    if unknown:
        raise EagleError(
            f"{path} has completions of {len(unknown)} tasks that {problems.name} does not have: "
            f"{some(unknown)}; give the data they were generated from, unfiltered"
        )
    counts = Counter(sample.name for sample in found.samples)
    if twice := [f"completion {n} of task {task}" for (task, n), c in counts.items() if c > 1]:
        raise EagleError(
            f"{path} has {some(twice)} twice; put a task's completions into one list, each with "
            "its own number"
        )
    return found


class Upstream(TypedDict):
    task_id: int | str
    output: list[str]


def read_upstream(path: Path) -> list[Sample]:
    try:
        rows = TypeAdapter(list[Upstream]).validate_json(path.read_bytes())
    except OSError as error:
        raise EagleError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise EagleError(
            f'{path} must hold a list of {{"task_id", "output": [text, …]}} ({reason(error)})'
        ) from error
    return [Sample(str(r["task_id"]), i, text) for r in rows for i, text in enumerate(r["output"])]


def write_upstream(path: str | Path, problems: Sequence[Problem], found: Generations) -> None:
    """[{"task_id", "prompt", "output": [...]}], of the problems that have completions; a number as
    id stays a number."""
    by_task = found.by_task()
    rows = [
        {
            "task_id": int(p.task_id) if p.task_id.isdigit() else p.task_id,
            "prompt": p.prompt,
            "output": [
                fenced(s.output) if s.chat else cut(s.output, p.stops) for s in by_task[p.task_id]
            ],
        }
        for p in problems
        if p.task_id in by_task
    ]
    atomic_write_text(path, json.dumps(rows, indent=1) + "\n")
