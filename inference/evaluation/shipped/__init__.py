"""A small problem set of our own in TACO's schema, and the checker of its one special problem."""

from pathlib import Path

PROBLEMS = Path(__file__).with_name("problems.jsonl")
CHECKERS = Path(__file__).with_name("checkers.py")
