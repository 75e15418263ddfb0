"""The flags of `python -m inference.evaluate`, in groups that its commands share, and what they
refuse."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eagle.errors import EagleError

from .comparators import POLICIES
from .executing import Rules
from .generations import Sampling
from .problem import ProblemSet
from .problems import READERS, load_problems
from .report import read_metrics
from .rows import reason
from .sandbox import Sandbox


def command(body: Callable[[typing.Any], int | None]) -> Callable[..., int | None]:
    """`body(flags: SomeFlags)` as a function of keyword arguments, for `configs.cli`."""
    [kind] = [hint for name, hint in typing.get_type_hints(body).items() if name != "return"]

    def run(**given):
        try:
            flags = kind(**given)
        except ValidationError as error:
            raise EagleError(reason(error)) from error
        return body(flags)

    run.__doc__ = body.__doc__
    run.__annotations__ = {name: field.annotation for name, field in kind.model_fields.items()}
    run.__signature__ = inspect.Signature(
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=field.annotation,
        )
        for name, field in kind.model_fields.items()
    )
    return run


class Flags(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Flags):
    output: str = "runs/evaluate"

    def folder(self) -> Path:
        """Made, so that it can be written."""
        Path(self.output).mkdir(parents=True, exist_ok=True)
        return Path(self.output)


class Data(Flags):
    data: str | None = None
    format: Literal[("auto", *READERS)] = "auto"
    difficulties: str | None = None
    skills: str | None = None
    limit: int | None = Field(None, ge=1)
    policy: Literal[("auto", *POLICIES)] = "auto"
    checkers: str | None = None
    max_bad_fraction: float = 0.05

    def problems(self) -> ProblemSet:
        def listed(text: str | None) -> list[str]:
            return [part.strip() for part in (text or "").split(",") if part.strip()]

        given = {name: getattr(self, name) for name in Data.model_fields}
        given |= {name: listed(given[name]) for name in ("difficulties", "skills")}
        return load_problems(given.pop("data"), **given)


class Model(Flags):
    base: str | None = None
    head: str | None = None
    adapter: str | None = None
    quantization: str = "none"
    tree: str | None = None
    compile: str = "auto"
    dtype: str = "auto"
    device: str | None = None

    def load(self):
        """-> EaModel."""
        from inference.generate import load_model

        return load_model(**{name: getattr(self, name) for name in Model.model_fields})


class Drawing(Model, Sampling):
    n_samples: int = Field(20, ge=1)
    slots: int = Field(16, ge=1)

    @model_validator(mode="after")
    def samples_differ(self):
        if self.temperature == 0 and self.n_samples > 1:
            raise ValueError(
                f"at temperature 0 all {self.n_samples} samples are the same program; use "
                "--n_samples 1, or a temperature"
            )
        return self

    def engine_of(self, model) -> str:
        """What "auto" means: to draft where there is a head."""
        drafts = "eagle" if model.drafter is not None else "vanilla"
        return drafts if self.engine == "auto" else self.engine

    def sampling(self, engine: str) -> Sampling:
        given = {name: getattr(self, name) for name in Sampling.model_fields}
        return Sampling(**{**given, "engine": engine})


class Running(Flags):
    """How programs are run."""

    seconds: float | None = Field(None, ge=0.1)
    memory_mb: int | None = Field(None, ge=16)
    workers: int | None = None
    isolation: str = "auto"
    allow_code_execution: bool = False

    def sandbox(self) -> Sandbox:
        """Started, so that a refusal comes before hours of generation."""
        allowed = self.allow_code_execution
        return Sandbox(workers=self.workers, level=self.isolation, allow_code_execution=allowed)

    @property
    def rules(self) -> Rules:
        return Rules(self.seconds, self.memory_mb)


class Scoring(Flags):
    k: str | None = None
    against: str | None = None
    max_harness_errors: float = 0.01

    def ks(self, n: int) -> list[int]:
        """n: samples a problem. Without --k, as many of 1, 5, 10 as n allows."""
        from inference.bench.engines import parse_numbers

        ks = parse_numbers("k", self.k) or [k for k in (1, 5, 10) if k <= max(n, 1)]
        if max(ks) > n:
            raise EagleError(
                f"pass@{max(ks)} needs at least {max(ks)} programs a problem and there are {n}; "
                "lower --k or raise --n_samples"
            )
        return ks

    def published(self) -> dict | None:
        return read_metrics(self.against) if self.against else None
