"""Which engines there are, and which cases a sweep over settings has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

STOCK = ("hf", "hf_prompt_lookup")
VANILLA = ("vanilla", "vanilla_compiled")
ENGINES = (*STOCK, *VANILLA, "eagle", "eagle_compiled", "eagle_auto")
# one token a pass: what speculation is measured against, and what its output must equal
PLAIN = ("hf", *VANILLA)
COMPILED = ("vanilla_compiled", "eagle_compiled", "eagle_auto")


@dataclass(frozen=True)
class Case:
    """One engine under one combination of settings. None: the setting does not apply, or is the
    default.
    """

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
        options = {"draft": self.speculative, "temperature": self.temperature, "compile": self.mode}
        for name in ("tree", "capacity", "forced_acceptance"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options


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
        tree."""
        found = []
        outer = itertools.product(self.temperatures, self.context_lengths, self.batch_sizes)
        for temperature, context, size in outer:
            common = dict(batch_size=size, temperature=temperature, context_length=context)
            group: dict[Case, None] = {}  # an ordered set
            inner = itertools.product(self.engines, self.trees, self.capacities)
            for engine, tree, capacity in inner:
                if engine == "hf_prompt_lookup" and size > 1:
                    continue
                case = Case(engine, **common)
                own = {} if case.stock else {"capacity": capacity}
                if case.speculative:
                    own["tree"] = "auto" if engine == "eagle_auto" else tree
                    own["forced_acceptance"] = self.forced_acceptance
                group[Case(engine, **common, **own)] = None
            if group:
                found.append(list(group))
        return found

    def leads(self, case: Case) -> bool:
        """Is it of the first setting of each sweep, which the headline figures are about?"""
        return (
            case.temperature == self.temperatures[0]
            and case.context_length == self.context_lengths[0]
            and case.tree in (None, "auto", self.trees[0])
            and (case.stock or case.capacity == self.capacities[0])
        )

    def notes(self) -> list[str]:
        """What was asked for and is not measured."""
        large = [str(s) for s in self.batch_sizes if s > 1]
        if "hf_prompt_lookup" in self.engines and large:
            return [
                f"hf_prompt_lookup is left out at batch size {', '.join(large)}: transformers' "
                "assisted generation takes one row at a time"
            ]
        return []


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
