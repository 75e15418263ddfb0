"""python -m inference.bench [SUBJECT] [--flag value …]; without a subject, the engines."""

import importlib
import sys

from configs import cli

SUBJECTS = {
    "engines": ("engines", "bench"),
    "cycle": ("cycle", "cycle"),
    "profile": ("cycle", "cycle"),
    "slots": ("slots", "measure_slots"),
    "train": ("train", "train"),
    "sandbox": ("sandbox", "sandbox"),
    "gpu": ("gpu", "gpu"),
    "model": ("model", "model"),
}


def main() -> None:
    words, subject = sys.argv[1:], "engines"
    if words and not words[0].startswith("-"):
        subject, words = words[0], words[1:]
    if subject not in SUBJECTS:
        sys.exit(f"error: unknown subject {subject!r}; one of {', '.join(SUBJECTS)}")
    module, name = SUBJECTS[subject]
    function = getattr(importlib.import_module(f"inference.bench.{module}"), name)
    cli.main(function, words, name=f"python -m inference.bench {subject}")


if __name__ == "__main__":
    main()
