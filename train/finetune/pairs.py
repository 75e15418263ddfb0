"""Preferences out of samples that were scored: by tests, by a judge, by people."""

from __future__ import annotations

import json
import math
from pathlib import Path

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.sources import read_records, resolve

FORMS = 'write {"prompt": ..., "samples": [{"text": ..., "score": 0.5}, ...]}, or one sample a line'
Sample = tuple[str, float]


def build(data: str, output: str, margin: float = 0.0, per_prompt: int = 1) -> int:
    """Read scored samples, write {prompt, chosen, rejected, score_chosen, score_rejected}, say what
    was dropped."""
    if margin < 0 or per_prompt < 1:
        raise EagleError("--margin must be 0 or more and --per_prompt 1 or more")
    prompts, unusable = read_scored([p.strip() for p in data.split(",")])
    lines, ties = [], 0
    for prompt, samples in prompts.items():
        chosen = choose_pairs(samples, margin, per_prompt)
        ties += not chosen
        for (better, high), (worse, low) in chosen:
            line = {"prompt": json.loads(prompt), "chosen": better, "rejected": worse}
            lines.append({**line, "score_chosen": high, "score_rejected": low})
    if not lines:
        raise EagleError(
            f"no preference in {data}: of {len(prompts)} prompts {ties} are ties or have one "
            f"sample; {FORMS}"
        )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write_text(Path(output), text)
    print(
        f"{len(lines)} pairs of {len(prompts)} prompts, {ties} prompts tied, "
        f"{unusable} samples unusable: {output}"
    )
    return 0


def choose_pairs(
    samples: list[Sample], margin: float, per_prompt: int
) -> list[tuple[Sample, Sample]]:
    """Best against worst, second best against second worst, …, while they differ by more than
    `margin`. The same text with several scores counts once, with their mean."""
    scores: dict[str, list[float]] = {}
    for text, score in samples:
        scores.setdefault(text.strip(), []).append(score)
    ranked = sorted(((text, sum(s) / len(s)) for text, s in scores.items()), key=lambda x: -x[1])
    places = range(min(per_prompt, len(ranked) // 2))
    pairs = [(ranked[place], ranked[-1 - place]) for place in places]
    return [(better, worse) for better, worse in pairs if better[1] - worse[1] > margin]


def read_scored(paths: list[str]) -> tuple[dict[str, list[Sample]], int]:
    """The samples of each prompt (as JSON), and how many cannot be used."""
    prompts: dict[str, list[Sample]] = {}
    bad = 0
    for record in (record for path in resolve(paths) for record in read_records(path)):
        value = record.value or {}
        given = value.get("samples", [value])
        if not value.get("prompt"):
            bad += 1
            continue
        kept = prompts.setdefault(json.dumps(value["prompt"]), [])
        for sample in given if isinstance(given, list) else [None]:
            text, score = map((sample if isinstance(sample, dict) else {}).get, ("text", "score"))
            number = isinstance(score, (int, float)) and math.isfinite(score)
            if isinstance(text, str) and text.strip() and number:
                kept.append((text, float(score)))
            else:
                bad += 1
    return prompts, bad
