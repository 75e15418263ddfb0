"""Where the data sets that come with the package lie."""

from __future__ import annotations

from pathlib import Path

from eagle.loading import EMBEDDED

SHIPPED_FORMATS = ("chat", "fim", "instruction")


def embedded_dir() -> Path:
    """Folder of the embedded model."""
    return EMBEDDED


def shipped(data_format: str, split: str = "train") -> Path | None:
    """The shipped file of a format (`split` train or eval); None when there is none."""
    if data_format not in SHIPPED_FORMATS:
        return None
    name = f"{data_format}.jsonl" if split == "train" else f"heldout_{data_format}.jsonl"
    path = EMBEDDED / "data" / name
    return path if path.is_file() else None
