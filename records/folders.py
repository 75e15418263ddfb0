"""Folders and data sets -> data files: source code, what `datasets.save_to_disk` wrote, the hub.

Knows which files; not what is in a record."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from eagle.errors import EagleError

logger = logging.getLogger("records")
CODE = (
    "py pyi js jsx mjs ts tsx java kt kts scala c h cc cpp cxx hh hpp cu cuh m mm cs go rs rb php "
    "swift lua pl r jl sh bash sql hs ml ex exs erl clj dart zig vue f90 asm proto tf"
)
SOURCE_CODE = tuple(f".{name}" for name in CODE.split())
OTHERS = {"node_modules", "site-packages", "__pycache__", "build", "dist", "vendor"}
DEEPEST, LARGEST = 32, 1 << 20  # folders below one another; bytes of a file
STATE = ("state.json", "dataset_info.json")  # of `save_to_disk`
LONG_LINE = 5000  # characters, of which a person writes none
GENERATED = re.compile(r"@generated|\bauto(matically)?[- ]?generated|\bdo not edit\b", re.I)


def find_documents(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """Files with these extensions in and below a folder. No link is followed, and what
    people did not write there is left out: hidden folders and OTHERS, files that are generated,
    binary, empty or large. How many is said."""
    found, skipped = [], Counter()
    walk = os.walk(folder, onerror=lambda error: skipped.update(["unreadable folders"]))
    for place, folders, names in walk:
        depth = len(Path(place).relative_to(folder).parts)
        kept = [name for name in folders if depth < DEEPEST and _is_own(Path(place, name))]
        skipped["folders"] += len(folders) - len(kept)
        folders[:] = sorted(kept)
        for path in (Path(place, name) for name in sorted(names)):
            if path.suffix.lower() in extensions:
                if reason := _unfit(path):
                    skipped[reason] += 1
                else:
                    found.append(path)
    if left_out := ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count):
        logger.warning("%s: %d files; left out: %s", folder, len(found), left_out)
    return found


def _is_own(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or (folder / "pyvenv.cfg").exists()
    return not (hidden or folder.name in OTHERS or folder.is_symlink())


def _unfit(path: Path) -> str | None:
    """Why a file is left out."""
    if path.is_symlink() or not path.is_file():
        return "links or devices"
    try:
        if path.stat().st_size > LARGEST:
            return "larger than 1 MB"
        text = path.read_bytes().decode()
    except OSError:
        return "unreadable"
    except UnicodeDecodeError:
        return "not UTF-8"
    if "\0" in text:
        return "binary"
    if not text.strip():
        return "empty"
    generated = GENERATED.search(text[:500]) or max(map(len, text.split("\n"))) > LONG_LINE
    return "generated" if generated else None


def saved_files(folder: Path, split: str = "") -> list[Path] | None:
    """The Arrow files of a data set that `save_to_disk` wrote; None where it did not. split: the
    one to take of several. Raises what reading damaged JSON does."""
    if (names := folder / "dataset_dict.json").is_file():
        folder /= _one_of(json.loads(names.read_text("utf-8"))["splits"], split, str(folder))
    elif split or not all((folder / name).is_file() for name in STATE):
        return None
    state = json.loads((folder / STATE[0]).read_text("utf-8"))
    return [folder / file["filename"] for file in state["_data_files"]]


def hub_files(name: str, config: str | None, split: str | None) -> list[Path]:
    """The Arrow files of a hub data set in the cache of `datasets`, downloaded where it has not
    got them."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, keep_in_memory=False)
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EagleError(
            f"{name}: no such data file, and no hub data set that can be loaded ({reason}); check "
            "the path (data.path), name its configuration (ORG/NAME:CONFIG:SPLIT), or load it once where "
            "the hub can be reached"
        ) from error
    chosen = found[_one_of(found, split, name if config is None else f"{name}:{config}")]
    return [Path(file["filename"]) for file in chosen.cache_files]


def _one_of(splits: Iterable[str], split: str | None, name: str) -> str:
    there = list(splits)
    if not split and len(there) == 1:
        return there[0]
    if split not in there:
        raise EagleError(f"{name} has the splits {', '.join(there)}; name one: {name}:{there[0]}")
    return split
