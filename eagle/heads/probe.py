"""Which convention do a head's layer ids follow? Draft with it under each, and see which is
accepted.

A head that reads the states of neighbouring layers still drafts, only worse; nothing in the files
tells.

T tokens of a text, F features, H hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import EagleError
from ..model import EaModel
from ..target import Target
from .configs import written_layers
from .head import DraftHead, build, causal
from .head_config import default_feature_layers
from .layers import candidates
from .read import Published

TREE = "16,4,4"
SURE = 3.0  # standard errors between the best and the second


@dataclass(frozen=True)
class Reading:
    """One reading of the ids: feature layers (entering ids), the acceptance length with them, and
    the probability that the head gives each token of the target's text one step ahead."""

    convention: str
    layers: tuple[int, ...]
    tau: float
    given: torch.Tensor  # [tokens]

    @property
    def rate(self) -> float:
        """Acceptance rate of drafts sampled at depth 1."""
        return self.given.mean().item()


@dataclass(frozen=True)
class Probed:
    """numbers: as written; readings: best first; sigmas: how many standard errors (paired over
    tokens) the best acceptance rate is above the second."""

    numbers: tuple[int, ...]
    readings: tuple[Reading, ...]
    sigmas: float

    @property
    def best(self) -> Reading:
        return self.readings[0]

    @property
    def clear(self) -> bool:
        return self.sigmas >= SURE

    def require_clear(self) -> Reading:
        if not self.clear:
            first, second = self.readings[:2]
            raise EagleError(
                f"--probe cannot tell {first.convention} (acceptance rate {first.rate:.3f}) from "
                f"{second.convention} ({second.rate:.3f}); give more prompts with --prompts and "
                "--num_prompts"
            )
        return self.best


def probe(
    published: Published,
    target: Target,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    numbers: Sequence[int] | None = None,
) -> Probed:
    """Greedy generation under every reading of the ids (`numbers`, or what the folder says, or
    EAGLE's default for this target). The text is the target's own in each; how many verifications
    it takes, and how well the head knows it, differs."""
    if published.eagle1:
        raise EagleError(f"{published.path} is an EAGLE-1 head: there are no ids")
    if numbers is None:
        numbers = written_numbers(published, len(target.layers))
    possible = candidates(numbers, len(target.layers))
    if not possible:
        raise EagleError(
            f"ids {list(numbers)} fit no target of {len(target.layers)} layers; give the head's "
            "own target"
        )
    config, state = published.parse(next(iter(possible.values())), target.embed.weight)
    readings, texts = [], None
    for convention, layers in possible.items():
        head = build(dataclasses.replace(config, feature_layers=layers), state)
        head = head.to(device=target.device, dtype=target.dtype)
        model = EaModel(target, head, TREE, compile="off")
        result = model.generate(list(prompts), max_new_tokens=max_new_tokens)
        # one text for all: in half precision near ties may fall otherwise
        texts = texts or [(len(row.prompt), row.prompt + row.tokens) for row in result.rows]
        given = [known(head, model.target, ids, start) for start, ids in texts]
        if not sum(map(len, given)):
            raise EagleError("the target writes nothing after these prompts; give others")
        readings.append(Reading(convention, layers, result.tau, torch.cat(given)))
    readings.sort(key=lambda r: -r.rate)
    return Probed(tuple(numbers), tuple(readings), _sigmas(readings))


def written_numbers(published: Published, num_layers: int) -> tuple[int, ...]:
    """The ids as the folder has them; where it has none, EAGLE's for a target of L layers."""
    numbers, _ = written_layers(published.format, published.raw)
    if numbers is None:
        return default_feature_layers(num_layers)
    published.layers()  # refuses ids that are none
    return tuple(numbers)


@torch.inference_mode()
def known(head: DraftHead, target: Target, ids: list[int], start: int) -> torch.Tensor:
    """[new tokens] probability that the head gives ids[t] from the target's features up to t - 2,
    for the tokens from `start` on; 0 for one without a draft id."""
    text = torch.tensor([ids], device=target.device)
    _, features = target.hidden_and_features(text)
    features = features.to(head.fc.weight.dtype)
    embed = head.embed_tokens if head.config.own_embedding else target.embed
    embeds = embed(text[:, 1:]).to(
        features.dtype
    )  # [1, T - 1, H]: the token that follows each feature
    positions = torch.arange(text.shape[1] - 1, device=target.device)[None]

    out = head(head.fuse(features[:, :-1]), embeds, positions, causal)
    draft = (
        head.logits(out)[0].float().softmax(-1)
    )  # [T - 1, D]: position t gives the token at t + 2
    ids_of_draft = head.draft_token_ids()
    place = torch.full((head.config.vocab_size,), -1, device=draft.device)  # draft id of each token
    place[ids_of_draft] = torch.arange(len(ids_of_draft), device=draft.device)
    at = torch.arange(max(start, 2), text.shape[1], device=target.device)
    column = place[text[0, at]]
    return torch.where(column < 0, 0.0, draft[at - 2, column.clamp(min=0)]).cpu()


def _sigmas(readings: list[Reading]) -> float:
    if len(readings) < 2:
        return float("inf")
    ahead = readings[0].given - readings[1].given
    if ahead.numel() < 2:
        return 0.0
    error = (ahead.std() / ahead.numel() ** 0.5).item()
    mean = ahead.mean().item()
    return mean / error if error else float("inf") if mean else 0.0


def describe(probed: Probed) -> list[str]:
    """Lines that say what was measured."""
    lines = [
        f"{r.convention:<10} layers entered {list(r.layers)}: acceptance length {r.tau:.2f}, rate "
        f"{r.rate:.3f}"
        for r in probed.readings
    ]
    verdict = (
        f"{probed.best.convention} is right ({probed.sigmas:.1f} standard errors ahead)"
        if probed.clear
        else f"the two best cannot be told apart ({probed.sigmas:.1f} standard errors); "
        "give more prompts"
    )
    tokens = probed.best.given.numel()
    return [
        f"ids {list(probed.numbers)}, {tokens} tokens of the target's own text, read as:",
        *lines,
        verdict,
    ]
