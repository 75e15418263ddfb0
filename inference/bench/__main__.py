"""python -m inference.bench [SUBJECT] [--flag value …]; without a subject, the engines."""

import importlib
import sys

from configs import cli

# and their functions
SUBJECTS = {"engines": "bench", "cycle": "cycle", "slots": "measure_slots", "train": "train"}
SUBJECTS |= {"sandbox": "sandbox", "gpu": "gpu", "model": "model"}


def main() -> None:
    words, subject = sys.argv[1:], "engines"
    if words and not words[0].startswith("-"):
        subject, *words = words
    if subject not in SUBJECTS:
        sys.exit(f"error: unknown subject {subject!r}; one of {', '.join(SUBJECTS)}")
    function = getattr(importlib.import_module(f"inference.bench.{subject}"), SUBJECTS[subject])
    cli.main(function, words, name=f"python -m inference.bench {subject}")


if __name__ == "__main__":
    main()
