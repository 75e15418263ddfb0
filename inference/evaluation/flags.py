"""The flags of `python -m inference.evaluate`, in groups that its commands share, and what they
refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eagle.errors import EagleError

from .executing import Executor, Rules
from .generations import Generator, Sampling
from .problem import ProblemSet, read_rows, reason
from .problems import load_problems
from .sandbox import Sandbox
from .scores import PLAIN, SPECULATIVE


def command(*groups: type[BaseModel]) -> Callable:
    """`body(flags)` as a function of keyword arguments, for `configs.cli`."""
    kind = type("Flags", groups, {})

    def decorate(body: Callable[[Any], int | None]) -> Callable[..., int | None]:
        def run(**given):
            try:
                flags = kind(**given)
            except ValidationError as error:
                raise EagleError(reason(error)) from error
            return body(flags)

        run.__doc__, run.__signature__ = body.__doc__, inspect.signature(kind)
        run.__annotations__ = {name: field.annotation for name, field in kind.model_fields.items()}
        return run

    return decorate


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
    limit: int | None = Field(None, ge=1)
    checkers: str | None = None
    max_bad_fraction: float = 0.05

    def problems(self) -> ProblemSet:
        given = self.model_dump(include=set(Data.model_fields))
        return load_problems(given.pop("data"), **given)


class Given(Data):
    generations: str


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

        return load_model(**self.model_dump(include=set(Model.model_fields)))


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

    def generators(self, output: Path, compare: bool = False) -> Iterator[Generator]:
        """Of both engines or of one ("auto" drafts where there is a head), compiled in turn."""
        from inference.generate import prepare

        model = self.load()
        auto = SPECULATIVE if model.drafter is not None else PLAIN
        engine = auto if self.engine == "auto" else self.engine
        given = self.model_dump(include=Sampling.model_fields.keys() - {"engine"})
        engines = (PLAIN, SPECULATIVE) if compare else (engine,)
        for generator in [Generator(model, Sampling(**given, engine=e), output) for e in engines]:
            prepare(model, generator.sampling.engine)
            yield generator


class Running(Flags):
    """How programs are run."""

    seconds: float | None = Field(None, ge=0.1)
    memory_mb: int | None = Field(None, ge=16)
    workers: int | None = None
    isolation: str = "auto"
    allow_code_execution: bool = False

    @contextmanager
    def executor(self, output: Path) -> Iterator[Executor]:
        """Its sandbox started, so that a refusal comes before hours of generation."""
        allowed, rules = self.allow_code_execution, Rules(self.seconds, self.memory_mb)
        with Sandbox(None, self.workers, self.isolation, allow_code_execution=allowed) as sandbox:
            with Executor(sandbox, output, rules) as executor:
                yield executor


class Scoring(Flags):
    k: str | None = None
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


class Whole(Output, Scoring, Running, Drawing, Data):
    verify: bool = True
    compare: bool = False


class Rows(Flags):
    data: str
    output: str | None = None
    max_bad_fraction: float = 0.0

    def read(self, validate: Callable[[dict], BaseModel]) -> tuple[list, list[dict]]:
        return read_rows(self.data, lambda row, place: validate(row), self.max_bad_fraction)


class Texts(Rows, Model):
    perplexity: bool = False
