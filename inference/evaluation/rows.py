"""Rows of a local data file: JSON lines, a JSON array, Parquet, or a folder of these. Knows nothing
of what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from eagle.errors import EagleError

KINDS = (".jsonl", ".json", ".parquet")


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(where it stands, the row). A line that is no JSON comes as the error, for the caller to
    count.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in KINDS)
        kinds = {p.suffix for p in files}
        if len(kinds) != 1:
            raise EagleError(
                f"{path} must hold files of one kind ({', '.join(KINDS)}), not "
                f"{' and '.join(sorted(kinds)) or 'none of these'}; name a file"
            )
        for file in files:
            yield from read_rows(file)
        return
    if not path.is_file():
        raise EagleError(f"no data file {path}; give a .jsonl, .json or .parquet file")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EagleError(f"cannot read {path}: {error}; data is UTF-8 text, or .parquet") from error
    if path.suffix == ".json" or text.lstrip().startswith("["):
        yield from read_array(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut inside strings
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                yield f"{path}:{number}", error


def read_array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise EagleError(f"{path} is not JSON ({error}); restore the file") from error
    if not isinstance(rows, list):
        raise EagleError(f"{path} must hold a JSON array of rows, not {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", row


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):  # a row of tests may have megabytes
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EagleError(f"cannot read {path}: {reason}; restore the file") from error
