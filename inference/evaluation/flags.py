"""The flags of `python -m inference.evaluate`, in groups that its commands share, and what they
refuse.

`command` turns a function of groups into one that `configs.cli` can run. Knows nothing of what the
commands do.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import EagleError


def command(body: Callable[..., int | None]) -> Callable[..., int | None]:
    """`body(data: Data, *, k: str | None = None)` as a function of the fields of Data and of k, all
    keyword-only.
    """
    hints = typing.get_type_hints(body)
    groups, parameters = {}, []
    for name, parameter in inspect.signature(body).parameters.items():
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[name], types = kind, typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=types[field.name],
                )
            )

    @functools.wraps(body)
    def run(**given):
        made = {
            name: kind(
                **{f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given}
            )
            for name, kind in groups.items()
        }
        return body(**made, **given)

    del run.__wrapped__
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def at_least(least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= least:
            raise EagleError(f"{name} must be at least {least:g}, not {value:g}")


def need(**values: str | None) -> None:
    for name, value in values.items():
        if value is None:
            raise EagleError(f"give --{name} FILE")


def listed(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


@dataclass(frozen=True)
class Data:
    data: str | None = None
    format: str = "auto"
    difficulties: str | None = None
    skills: str | None = None
    limit: int | None = None
    policy: str = "auto"
    checkers: str | None = None
    max_bad_fraction: float = 0.05

    def load(self):
        """-> ProblemSet."""
        from .problems import FORMATS, load_problems

        if self.format not in ("auto", *FORMATS):
            raise EagleError(f"unknown format {self.format!r}; use auto, {', '.join(FORMATS)}")
        at_least(1, limit=self.limit)
        return load_problems(
            self.data,
            format=None if self.format == "auto" else self.format,
            policy=self.policy,
            difficulties=listed(self.difficulties),
            skills=listed(self.skills),
            limit=self.limit,
            max_bad_fraction=self.max_bad_fraction,
            checkers=self.checkers,
        )


@dataclass(frozen=True)
class Model:
    base: str | None = None
    head: str | None = None
    adapter: str | None = None
    quantization: str = "none"
    engine: str = "auto"
    tree: str | None = None
    compile: str = "auto"
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "eagle", "vanilla"):
            raise EagleError(f"unknown engine {self.engine!r}; use auto, eagle or vanilla")

    def load(self):
        """-> EaModel."""
        from inference.generate import load_model

        return load_model(
            self.base,
            self.head,
            self.adapter,
            self.tree,
            self.dtype,
            self.device,
            self.compile,
            self.quantization,
        )

    def engine_of(self, model) -> str:
        """What "auto" means: to draft where there is a head."""
        if self.engine != "auto":
            return self.engine
        return "eagle" if model.drafter is not None else "vanilla"


@dataclass(frozen=True)
class Drawing:
    """How many samples, and how they are drawn."""

    n_samples: int = 20
    temperature: float = 0.2
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    chat: bool = False
    slots: int = 16

    def __post_init__(self) -> None:
        at_least(1, n_samples=self.n_samples, max_new_tokens=self.max_new_tokens, slots=self.slots)
        if self.temperature == 0 and self.n_samples > 1:
            raise EagleError(
                f"at temperature 0 all {self.n_samples} samples are the same program; use --n_samples 1, or a temperature"
            )

    def sampling(self, engine: str, model: Model):
        """-> Sampling."""
        from .generations import Sampling

        return Sampling(
            engine=engine,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            tree=model.tree,
            compile=model.compile,
            chat=self.chat,
        )


@dataclass(frozen=True)
class Running:
    """How programs are run."""

    seconds: float | None = None
    memory_mb: int | None = None
    workers: int | None = None
    isolation: str = "auto"
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        at_least(0.1, seconds=self.seconds)
        at_least(16, memory_mb=self.memory_mb)

    def sandbox(self):
        """Started, so that a refusal comes before hours of generation."""
        from inference.evaluation.sandbox import Sandbox

        return Sandbox(
            workers=self.workers,
            level=self.isolation,
            allow_code_execution=self.allow_code_execution,
        )

    @property
    def rules(self):
        from .executing import Rules

        return Rules(self.seconds, self.memory_mb)


@dataclass(frozen=True)
class Scoring:
    k: str | None = None
    against: str | None = None
    max_harness_errors: float = 0.01

    def ks(self, n: int | None = None) -> list[int]:
        """n: samples a problem, where it is known. Without --k, as many of 1, 5, 10 as n allows."""
        from inference.bench.engines import parse_numbers

        if self.k is None:
            return [k for k in (1, 5, 10) if k == 1 or n is None or k <= n]
        ks = parse_numbers("k", self.k)
        if n is not None and max(ks) > n:
            raise EagleError(
                f"pass@{max(ks)} needs at least {max(ks)} programs a problem and n_samples is {n}; "
                "lower --k or raise --n_samples"
            )
        return ks

    @property
    def published(self) -> dict | None:
        from .report import read_metrics

        return read_metrics(self.against) if self.against else None


def folder(output: str) -> Path:
    """Made, so that it can be written."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EagleError(
            f"{path} cannot be made ({error.strerror}); choose another --output"
        ) from error
    return path
