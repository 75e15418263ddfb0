"""Which engines there are, and which cases a sweep over settings has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

STOCK = ("hf", "hf_prompt_lookup")
VANILLA = ("vanilla", "vanilla_compiled")
ENGINES = (*STOCK, *VANILLA, "eagle", "eagle_compiled", "eagle_auto")
# one token a pass: what speculation is measured against, and what its output must equal
PLAIN = ("hf", *VANILLA)
COMPILED = ("vanilla_compiled", "eagle_compiled", "eagle_auto")


@dataclass(frozen=True)
class Case:
    """One engine under one combination of settings; None: does not apply, or is the default."""

    engine: str
    batch_size: int = 1
    temperature: float = 0.0
    context_length: int | None = None
    tree: str | None = None  # "16,4,4", or "auto"
    capacity: int | None = None
    forced_acceptance: int | None = None

    @property
    def speculative(self) -> bool:
        """Drafts with a head of ours."""
        return self.engine.startswith("eagle")

    @property
    def stock(self) -> bool:
        return self.engine in STOCK

    @property
    def mode(self) -> str:
        """What `EaModel` calls `compile`."""
        return "max" if self.engine in COMPILED else "off"

    @property
    def options(self) -> dict:
        """For `EaModel.generate`."""
        names = ("temperature", "tree", "capacity", "forced_acceptance")
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return {"draft": self.speculative, "compile": self.mode, **given}


@dataclass(frozen=True)
class Sweep:
    """Every combination of these is measured."""

    engines: Sequence[str]
    batch_sizes: Sequence[int] = (1,)
    trees: Sequence[str | None] = (None,)
    context_lengths: Sequence[int | None] = (None,)
    capacities: Sequence[int | None] = (None,)
    temperatures: Sequence[float] = (0.0,)
    forced_acceptance: int | None = None

    def groups(self) -> list[list[Case]]:
        """Cases that are timed in turn on the same prompts. An engine is in a group once for each
        setting that matters to it: stock `generate` has no tree and no capacity, plain decoding no
        tree; stock prompt lookup takes one row at a time."""
        found = []
        for temperature, context, size in itertools.product(
            self.temperatures, self.context_lengths, self.batch_sizes
        ):
            group: dict[Case, None] = {}  # an ordered set
            for engine, tree, capacity in itertools.product(
                self.engines, self.trees, self.capacities
            ):
                case = Case(engine, size, temperature, context)
                if not case.stock:
                    case = replace(case, capacity=capacity)
                if case.speculative:
                    tree = "auto" if engine == "eagle_auto" else tree
                    case = replace(case, tree=tree, forced_acceptance=self.forced_acceptance)
                if size == 1 or engine != "hf_prompt_lookup":
                    group[case] = None
            found += [list(group)] if group else []
        return found

    def leads(self, case: Case) -> bool:
        """Is it of the first setting of each sweep, which the headline figures are about?"""
        return (
            case.temperature == self.temperatures[0]
            and case.context_length == self.context_lengths[0]
            and case.tree in (None, "auto", self.trees[0])
            and (case.stock or case.capacity == self.capacities[0])
        )


def with_context(prompts: list[list[int]], length: int | None) -> list[list[int]]:
    """Each prompt with exactly `length` tokens: it keeps its end, and what is missing before it is
    taken from the prompts before it, round and round."""
    if length is None:
        return prompts
    fitted = []
    for number, prompt in enumerate(prompts):
        tokens, before = list(prompt), number
        while len(tokens) < length:
            before -= 1
            tokens = prompts[before % len(prompts)] + tokens
        fitted.append(tokens[len(tokens) - length :])
    return fitted
