"""A small problem set of our own in the TACO schema; `python -m inference.evaluation.shipped` makes
the file.
"""

from __future__ import annotations

from pathlib import Path

PROBLEMS = Path(__file__).with_name("problems.jsonl")
CHECKERS = Path(__file__).with_name("checkers.py")
