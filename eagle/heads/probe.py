"""Which convention do a head's layer ids follow? Draft with it under each, and see which is
accepted.

A head that reads the states of neighbouring layers still drafts, only worse; nothing in the files
tells.

T tokens of a text, F features, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import EagleError
from ..model import EaModel
from ..target import Target
from .configs import candidates, written_layers
from .head import DraftHead, build, causal
from .head_config import default_feature_layers
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

    def best(self) -> Reading:
        """Refused where it is not clear which is."""
        if self.sigmas < SURE:
            first, second = self.readings[:2]
            raise EagleError(
                f"--probe cannot tell {first.convention} (acceptance rate {first.rate:.3f}) from "
                f"{second.convention} ({second.rate:.3f}); give more prompts with --prompts and "
                "--num_prompts"
            )
        return self.readings[0]

    def lines(self) -> list[str]:
        """What was measured, in words."""
        first, apart = self.readings[0], f"{self.sigmas:.1f} standard errors"
        verdict = f"{first.convention} is right ({apart} ahead)"
        if self.sigmas < SURE:
            verdict = f"the two best cannot be told apart ({apart}); give more prompts"
        tokens = f"{first.given.numel()} tokens of the target's own text"
        return [
            f"ids {list(self.numbers)}, {tokens}, read as:",
            *(
                f"{r.convention:<10} layers entered {list(r.layers)}: acceptance length "
                f"{r.tau:.2f}, rate {r.rate:.3f}"
                for r in self.readings
            ),
            verdict,
        ]


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
        numbers, _ = written_layers(published.format, published.raw)
        if numbers is None:
            numbers = default_feature_layers(len(target.layers))
        else:
            published.layers()  # refuses ids that are none
    possible = candidates(numbers, len(target.layers))
    if not possible:
        raise EagleError(
            f"ids {list(numbers)} fit no target of {len(target.layers)} layers; give the head's "
            "own target"
        )
    config, state = published.parse(next(iter(possible.values())), target.embed.weight)
    readings, texts = [], None
    for convention, layers in possible.items():
        head = build(config.model_copy(update={"feature_layers": layers}), state)
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
    sigmas = float("inf")
    if len(readings) > 1:
        ahead = readings[0].given - readings[1].given
        error = (ahead.std() / ahead.numel() ** 0.5).item()  # NaN of one token
        sigmas = ahead.mean().item() / error if error > 0 else 0.0
    return Probed(tuple(numbers), tuple(readings), sigmas)


@torch.inference_mode()
def known(head: DraftHead, target: Target, ids: list[int], start: int) -> torch.Tensor:
    """[new tokens] probability that the head gives ids[t] from the target's features up to t - 2,
    for the tokens from `start` on; 0 for one without a draft id."""
    text = torch.tensor([ids], device=target.device)
    _, features = target.hidden_and_features(text)
    features = features.to(head.fc.weight.dtype)
    embed = head.embed_tokens if head.config.own_embedding else target.embed
    # [1, T - 1, H]: the token that follows each feature
    embeds = embed(text[:, 1:]).to(features.dtype)
    positions = torch.arange(text.shape[1] - 1, device=target.device)[None]

    out = head(head.fuse(features[:, :-1]), embeds, positions, causal)
    # [T - 1, D]: position t gives the token at t + 2
    draft = head.logits(out)[0].float().softmax(-1)
    ids_of_draft = head.draft_token_ids()
    place = torch.full((head.config.vocab_size,), -1, device=draft.device)  # draft id of each token
    place[ids_of_draft] = torch.arange(len(ids_of_draft), device=draft.device)
    at = torch.arange(max(start, 2), text.shape[1], device=target.device)
    column = place[text[0, at]]
    return torch.where(column < 0, 0.0, draft[at - 2, column.clamp(min=0)]).cpu()
