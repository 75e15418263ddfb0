"""Where the data sets that come with the package lie."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SHIPPED_FORMATS = ("chat", "fim", "instruction")


def embedded_dir() -> Path:
    """Folder of the embedded model."""
    spec = find_spec("eagle")
    assert spec is not None and spec.submodule_search_locations
    return Path(list(spec.submodule_search_locations)[0]) / "embedded"


def shipped(data_format: str, split: str = "train") -> Path | None:
    """The shipped file of a format (`split` train or eval); None when there is none."""
    if data_format not in SHIPPED_FORMATS:
        return None
    name = f"{data_format}.jsonl" if split == "train" else f"heldout_{data_format}.jsonl"
    path = embedded_dir() / "data" / name
    return path if path.is_file() else None
