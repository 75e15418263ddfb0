"""The data card beside a file of answers: who wrote them, how, and whether the file is still that
one. `train.prepare regenerate` writes cards, a training run reads them.

    ANSWERS.jsonl   ANSWERS.card.json   ANSWERS.quarantine.jsonl

`policy` is "on": the answers are those of the card's `target`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from eagle.errors import EagleError
from eagle.fingerprint import is_earlier

logger = logging.getLogger("records")
CARD, QUARANTINE = ".card.json", ".quarantine.jsonl"
BY_TARGET, AS_GIVEN = "written by the target", "as in the data"


def at_endpoint(name: str) -> str:
    return f"written by {name} at an endpoint"


def card_path(data: Path) -> Path:
    return data.with_name(data.stem + CARD)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_card(data: Path) -> dict | None:
    """The card of a data file; None when there is none, or it is of another file of that name."""
    path = card_path(data)
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        name, complete, digest = card["file"], card["complete"], card.get("sha256")
        _ = [card["target"][name] for name in ("id", "fingerprint", "adapter")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EagleError(
            f"{path} is not a readable data card ({error}); delete it, or regenerate the answers"
        ) from error
    if name != data.name:
        return None
    if not complete:
        logger.warning("%s is not finished: run `train.prepare regenerate` again", data)
    elif digest != file_hash(data):
        logger.warning("%s has changed since its card %s was written; it is not used", data, path)
        return None
    return card


def who_answered(
    files: Iterable[Path], on_policy: bool | None, fingerprint: str, adapter: str | None
) -> str:
    """What is recorded with a head about the answers in `files`; warns when another target wrote
    them. on_policy: what the user says, None to believe the cards. fingerprint, adapter: of the
    run's target."""
    if on_policy is not None:
        return BY_TARGET if on_policy else AS_GIVEN
    found = {path: _who_answered(path, fingerprint, adapter) for path in dict.fromkeys(files)}
    kinds = set(found.values())
    if len(kinds) == 1:
        return kinds.pop()
    return "; ".join(f"{path.name}: {text}" for path, text in found.items())


def _who_answered(path: Path, fingerprint: str, adapter: str | None) -> str:
    card = read_card(path)
    if card is None:
        return AS_GIVEN
    name, weights, tuned = (card["target"][key] for key in ("id", "fingerprint", "adapter"))
    if (weights, tuned) == (fingerprint, adapter):
        return BY_TARGET
    if weights is None or is_earlier(weights):
        how = "at an endpoint" if weights is None else "as an earlier version recorded"
        said = "%s was written by %s %s, whose weights nobody compared with this target's"
        logger.warning(said + "; set data.on_policy=true if they are the same", path, name, how)
        return at_endpoint(name) if weights is None else f"written by {name}, not compared"
    said = "%s was written by another target, %s: a head learns less of what this target says; "
    logger.warning(said + "regenerate the answers with it", path, name)
    return f"written by {name}, another target"
