"""A request and what has become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import EagleError
from .sampling import SamplingParams


@dataclass(frozen=True)
class Stopping:
    """When a row is done. `stop(tokens)`: how many of a row's new tokens to keep, or None to go
    on."""

    max_new_tokens: int = 512
    eos_token_ids: frozenset[int] = frozenset()
    stop: Callable[[list[int]], int | None] | None = None
    max_length: int | None = None

    def budget(self, prompt_length: int, max_positions: int) -> int:
        """How many new tokens a row may have; raises when not even one fits."""
        limit = max_positions if self.max_length is None else min(max_positions, self.max_length)
        if prompt_length >= limit:
            said = f"the prompt has {prompt_length} tokens and the limit is {limit} with a new one"
            raise EagleError(f"{said}; shorten the prompt or raise max_length")
        return min(self.max_new_tokens, limit - prompt_length)


@dataclass(frozen=True)
class Request:
    """processor(context, logits [V]) -> scores [V]; logprobs: keep the target's log-probability of
    each new token; given: the prompt as processors see it, with the padding it came with."""

    prompt: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    stopping: Stopping = field(default_factory=Stopping)
    processor: Callable | None = None
    logprobs: bool = False
    given: list[int] | None = None


@dataclass
class Row:
    """A request in work. `tokens` are new tokens, an end token kept once; `accepted[a]` counts the
    cycles in which a draft tokens were accepted, before any cut at an end token or limit. `error`:
    the request's own processor or stopping failed."""

    request: Request
    budget: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "eos", "stop", "length", "cancelled" or "error"
    cycles: int = 0
    accepted: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: EagleError | None = None

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def context(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def seen(self) -> list[int]:
        """What processors are shown."""
        return (self.request.given or self.prompt) + self.tokens

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def tau(self) -> float:
        """Tokens gained per verification; the first token comes from the prompt's own pass."""
        return (len(self.tokens) - 1) / self.cycles if self.cycles else 0.0

    def cancel(self) -> None:
        """Give up at the next cycle; what is there stays."""
        self.finish_reason = self.finish_reason or "cancelled"

    def fail(self, what: str, error: Exception) -> None:
        self.finish_reason = "error"
        self.error = EagleError(f"{what} of a request raised {type(error).__name__}: {error}")
        self.error.__cause__ = error

    def take(self, gained: list[int]) -> int:
        """Append what this row may still have of `gained`; returns how many."""
        if self.done:  # given up, or its processor failed: what was chosen since is not its own
            return 0
        stopping = self.request.stopping
        gained = gained[: self.budget - len(self.tokens)]
        for place, token in enumerate(gained):
            if token in stopping.eos_token_ids:
                gained = gained[: place + 1]
                self.finish_reason = "eos"
                break
        before = len(self.tokens)
        self.tokens += gained
        if stopping.stop is not None:
            try:
                keep = stopping.stop(self.tokens)
            except Exception as error:
                self.fail("the stopping rule", error)
                return len(gained)
            if keep is not None:
                self.tokens = self.tokens[: max(keep, 0)]
                self.finish_reason = "stop"
        if not self.done and len(self.tokens) >= self.budget:
            self.finish_reason = "length"
        return min(len(gained), max(len(self.tokens) - before, 0))
