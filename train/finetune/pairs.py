"""Preferences out of samples that were scored: by tests, by a judge, by people.

Knows records; knows nothing of tokens or models.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.sources import read_records, resolve

FORMS = 'write {"prompt": ..., "samples": [{"text": ..., "score": 0.5}, ...]}, or one sample a line'


def build(data: str, output: str, margin: float = 0.0, per_prompt: int = 1) -> int:
    """Read scored samples, write {prompt, chosen, rejected, score_chosen, score_rejected}, say what
    was dropped.
    """
    if margin < 0 or per_prompt < 1:
        raise EagleError("--margin must be 0 or more and --per_prompt 1 or more")
    prompts, bad = read_scored([p.strip() for p in data.split(",")])
    counts: Counter = Counter(prompts=len(prompts), unusable=bad)
    lines = []
    for prompt, samples in prompts.values():
        for pair in choose_pairs(samples, margin, per_prompt, counts):
            (better, high), (worse, low) = pair
            lines.append(
                {
                    "prompt": prompt,
                    "chosen": better,
                    "rejected": worse,
                    "score_chosen": high,
                    "score_rejected": low,
                }
            )
    if not lines:
        raise EagleError(
            f"no preference in {data}: of {len(prompts)} prompts {counts['ties']} are ties or have one "
            f"sample; {FORMS}"
        )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write_text(Path(output), text)
    print(
        f"{len(lines)} pairs of {len(prompts)} prompts, {counts['ties']} prompts tied, "
        f"{counts['unusable']} samples unusable: {output}"
    )
    return 0


def choose_pairs(
    samples: list[tuple[str, float]], margin: float, per_prompt: int, counts: Counter
) -> Iterator[tuple[tuple[str, float], tuple[str, float]]]:
    """Best against worst, second best against second worst, …, while they differ by more than
    `margin`.

    The same text with several scores counts once, with their mean.
    """
    scores: dict[str, list[float]] = {}
    for text, score in samples:
        scores.setdefault(text.strip(), []).append(score)
    ranked = sorted(((text, sum(s) / len(s)) for text, s in scores.items()), key=lambda x: -x[1])
    found = 0
    for place in range(min(per_prompt, len(ranked) // 2)):
        better, worse = ranked[place], ranked[-1 - place]
        if better[1] - worse[1] <= margin:
            break
        found += 1
        yield better, worse
    counts["ties"] += not found


def read_scored(paths: list[str]) -> tuple[dict[str, tuple], int]:
    """Key -> (prompt, [(text, score)]), and how many samples cannot be used."""
    prompts: dict[str, tuple] = {}
    bad = 0
    for path in resolve(paths):
        for record in read_records(path):
            value = record.value
            if value is None or not value.get("prompt"):
                bad += 1
                continue
            given = value.get("samples", [value])
            kept = prompts.setdefault(
                json.dumps(value["prompt"], sort_keys=True), (value["prompt"], [])
            )
            for sample in given if isinstance(given, list) else [None]:
                text = sample.get("text") if isinstance(sample, dict) else None
                score = sample.get("score") if isinstance(sample, dict) else None
                number = isinstance(score, (int, float)) and math.isfinite(score)
                if isinstance(text, str) and text.strip() and number:
                    kept[1].append((text, float(score)))
                else:
                    bad += 1
    return prompts, bad
