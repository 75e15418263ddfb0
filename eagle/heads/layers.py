"""Which hidden states of the target the numbers in a head's config mean.

Inside this package a feature layer is an entering-layer id: `hidden_states[i]` of transformers
enters layer i (i = 0: the embedding). What projects write:

- SafeAILab's code takes `hidden_states[2], [L // 2], [L - 3]` and its configs name no layers; vLLM
  (`aux_hidden_state_layers`, a state taken before layer i runs) and speculators
  (`eagle_aux_hidden_state_layer_ids` beside it) count the same way: "entering";
- SGLang, SpecForge and ModelOpt write `[1, L // 2 - 1, L - 4]` under `eagle_config` for the same
  states: outputs of layer i (SGLang's `set_eagle3_layers_to_capture` adds one): "output";
- the numbers of one kind copied into a config of the other are off by one, either way. "one-based"
  is the mistake that "output" does not cover: the numbers are one too high.

L layers of the target."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import EagleError

SHIFT = {"entering": 0, "output": 1, "one-based": -1}  # entering id = number + shift
MEANING = {
    "entering": "the state that enters layer i (EAGLE, vLLM, speculators: 2, L//2, L-3)",
    "output": "the output of layer i (SGLang, SpecForge, ModelOpt: 1, L//2-1, L-4)",
    "one-based": "the state that enters layer i when layers are counted from 1",
}


def entering_ids(numbers: Sequence[int], convention: str) -> tuple[int, ...]:
    """Numbers as written -> entering-layer ids."""
    if convention not in SHIFT:
        raise EagleError(f"unknown convention {convention!r}; use {', '.join(SHIFT)}")
    return tuple(int(i) + SHIFT[convention] for i in numbers)


def written_ids(layers: Sequence[int], convention: str, name: str) -> list[int]:
    """Entering-layer ids -> numbers in that convention."""
    numbers = [i - SHIFT[convention] for i in layers]
    if min(numbers) < 0:
        raise EagleError(
            f"the head reads the target's embedding (entering layer 0), which {name} has no id "
            "for; use --to vllm"
        )
    return numbers


def candidates(numbers: Sequence[int], num_layers: int) -> dict[str, tuple[int, ...]]:
    """The readings of `numbers` that a target of L layers has."""
    every = {convention: entering_ids(numbers, convention) for convention in SHIFT}
    return {c: ids for c, ids in every.items() if all(0 <= i <= num_layers for i in ids)}


def absent(path: object, name: str) -> EagleError:
    """No ids are written: what to do."""
    kinds = "; ".join(f"{kind}: i is {meaning}" for kind, meaning in MEANING.items())
    return EagleError(
        f"{path} ({name}) names no feature layers. Give --layer_ids i,j,k with --convention, or "
        f"find out with --probe --target PATH, which measures acceptance under each. {kinds}"
    )
