"""Config -> tokenised data: files, cache, quarantine, split and mixture put together."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import DataConfig, MixtureSource
from eagle.errors import EagleError
from records.cache import CacheEntry, load_or_build
from records.mixture import MixtureDataset, RoundRobin
from records.quarantine import BadRow, enforce, write_quarantine
from records.render import make_renderer
from records.shipped import SHIPPED_FORMATS, shipped
from records.sources import resolve

logger = logging.getLogger("records")


class Source:
    """The rows of one format that belong to a split, read from the cache's memory map.

    `number` is its place in a mixture, `name` what metrics call it, `loss_weight` how much its
    rows' losses count beside the others'.
    """

    def __init__(
        self, entry: CacheEntry, data_format: str, indices: np.ndarray, files: list[Path]
    ) -> None:
        self.format = data_format
        self.indices = indices
        self.entry = entry
        self.files = files
        self.number, self.name, self.loss_weight = 0, data_format, 1.0
        tokens = entry.table.data.column("input_ids").chunks
        self._lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in tokens])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.entry.table[int(self.indices[index])]
        return {
            "input_ids": row["input_ids"],
            "loss_mask": row["loss_mask"],
            "format": self.format,
            "source": self.number,
            "loss_weight": self.loss_weight,
        }

    def length(self, index: int) -> int:
        """Tokens of a row, known without reading it."""
        return int(self._lengths[self.indices[index]])

    def where(self, index: int) -> str:
        """FILE:LINE of the record that a row was made of."""
        row = self.entry.table.select([int(self.indices[index])])
        return f"{self.files[row['file'][0]]}:{row['line'][0]}"

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64: how often each token is a supervised target of these rows."""
        ids, mask = self.columns("input_ids", "loss_mask")
        return np.bincount(ids[mask == 1], minlength=vocab_size)[:vocab_size]

    def columns(self, *names: str) -> list[np.ndarray]:
        """Whole columns of this split's rows, list columns flattened."""
        table = self.entry.table.select(self.indices).with_format("arrow")
        flat: list[list[np.ndarray]] = [[] for _ in names]
        for batch in table.iter(batch_size=1000):
            for n, name in enumerate(names):
                column = batch[name].combine_chunks()
                values = column.flatten() if hasattr(column, "flatten") else column
                flat[n].append(values.to_numpy(zero_copy_only=False))
        return [np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in flat]


class TokenizedData:
    """Rows by index: `input_ids` and `loss_mask` (list[int]), `format`, and the number of their
    `source` and its `loss_weight`.

    `stats` counts rows, truncated, tokens and supervised_tokens of this split, records and bad of
    its files, and says `cache_hit`; `bad_rows` names each rejected row.
    """

    def __init__(self, sources: list[Source], order: Any, paths: list[Path]) -> None:
        self.sources = sources
        self.order = order
        self.paths = paths
        self.bad_rows: list[BadRow] = [row for s in sources for row in s.entry.bad]
        self.cache_hit = all(source.entry.cache_hit for source in sources)
        self.stats = self._count()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.order[index]

    def set_epoch(self, epoch: int) -> None:
        """New order for a mixture; a single source keeps its order (the loop shuffles it)."""
        if isinstance(self.order, MixtureDataset):
            self.order.set_epoch(epoch)

    def length(self, index: int) -> int:
        """Tokens of a row, known without reading it."""
        source, row = self._locate(index)
        return self.sources[source].length(row)

    def where(self, index: int) -> str:
        """FILE:LINE of the record that a row was made of."""
        source, row = self._locate(index)
        return self.sources[source].where(row)

    @property
    def digest(self) -> str:
        """A hash of the records behind the rows, in their order, and of how often each source is
        seen.
        """
        digest = hashlib.sha256(repr(getattr(self.order, "counts", None)).encode())
        for source in self.sources:
            (keys,) = source.columns("key")
            digest.update(np.ascontiguousarray(keys, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _locate(self, index: int) -> tuple[int, int]:
        return self.order.locate(index) if hasattr(self.order, "locate") else (0, index)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64: how often each token is a supervised target in an epoch."""
        rows = getattr(self.order, "counts", [len(source) for source in self.sources])
        counts = np.zeros(vocab_size, dtype=np.float64)
        for source, seen in zip(self.sources, rows, strict=True):
            counts += source.token_counts(vocab_size) * (seen / len(source))
        return np.rint(counts).astype(np.int64)

    def _count(self) -> dict[str, Any]:
        stats: dict[str, Any] = dict.fromkeys(
            ("rows", "records", "bad", "truncated", "tokens", "supervised_tokens"), 0
        )
        for source in self.sources:
            mask, truncated = source.columns("loss_mask", "truncated")
            stats["rows"] += len(source)
            stats["records"] += source.entry.records
            stats["bad"] += len(source.entry.bad)
            stats["truncated"] += int(truncated.sum())
            stats["tokens"] += len(mask)
            stats["supervised_tokens"] += int(mask.sum(dtype=np.int64))
        stats["cache_hit"] = self.cache_hit
        return stats


def load_dataset_for(
    cfg: DataConfig, tokenizer: Any, *, split: str = "train", out_dir: str | Path | None = None
) -> TokenizedData:
    """Tokenised rows of `cfg` for `split` (train or eval).

    Rejected rows are written to `out_dir/quarantine.jsonl` (`quarantine_eval.jsonl` for eval).
    Raises `EagleError` for missing or empty data, and above `cfg.max_bad_fraction`.
    """
    assert split in ("train", "eval"), split
    name = "quarantine.jsonl" if split == "train" else "quarantine_eval.jsonl"
    quarantine = Path(out_dir) / name if out_dir is not None else None
    if cfg.format == "mixed":
        sources = _mixture_sources(cfg, tokenizer, split)
    else:
        sources = [_source(cfg, cfg.format, cfg.paths, cfg.eval_paths, tokenizer, split)]
    _report_bad(sources, cfg, quarantine)
    for source in sources:
        if len(source) == 0:
            raise EagleError(_no_rows(source, split))
    order: Any = sources[0]
    if cfg.format == "mixed":
        weights = [s.weight for s in cfg.mixture] if cfg.mixture else None
        train_order = split == "train"
        order = MixtureDataset(sources, weights, cfg.seed) if train_order else RoundRobin(sources)
    data = TokenizedData(sources, order, [path for source in sources for path in source.files])
    if data.stats["truncated"]:
        logger.warning(
            "%d of %d %s rows did not fit in data.max_length=%d and were cut",
            data.stats["truncated"],
            data.stats["rows"],
            split,
            cfg.max_length,
        )
    return data


def _mixture_sources(cfg: DataConfig, tokenizer: Any, split: str) -> list[Source]:
    listed = cfg.mixture or [MixtureSource(format=name) for name in SHIPPED_FORMATS]
    sources: list[Source] = []
    for number, entry in enumerate(listed):
        source = _source(cfg, entry.format, entry.paths, entry.eval_paths, tokenizer, split)
        source.number, source.loss_weight = number, entry.loss_weight
        source.name, n = entry.name or entry.format, 1
        while source.name in {other.name for other in sources}:
            n += 1
            source.name = f"{entry.name or entry.format} {n}"
        sources.append(source)
    return sources


def _source(
    cfg: DataConfig,
    data_format: str,
    given: list[str] | None,
    eval_given: list[str] | None,
    tokenizer: Any,
    split: str,
) -> Source:
    """One format's rows of a split."""
    renderer = make_renderer(data_format, cfg, tokenizer)
    carve = False
    if split == "eval" and eval_given:
        files = resolve(eval_given)
    elif given is None:
        held_out = shipped(data_format, "eval")
        carve = held_out is None and not eval_given
        found = held_out if split == "eval" and held_out else shipped(data_format, "train")
        if found is None:
            raise EagleError(_nothing_shipped(data_format))
        files = [found]
    else:
        carve = not eval_given
        files = resolve(given)
    entry = load_or_build(files, data_format, cfg, tokenizer, renderer)
    keys = np.asarray(entry.table.with_format("numpy")["key"][:], dtype=np.int64)
    held = _held_out(keys, cfg.heldout_fraction) if carve else np.zeros(len(keys), dtype=bool)
    if carve and split == "eval" and not held.any() and len(keys):
        raise EagleError(
            f"{files[0]}: no rows can be held out of {len(np.unique(keys))} distinct rows at "
            f"data.heldout_fraction={cfg.heldout_fraction:g}; give data.eval_path"
        )
    wanted = held if carve and split == "eval" else ~held
    return Source(entry, data_format, np.flatnonzero(wanted), files)


def _held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """True for held-out rows: by the record's hash, so equal records stay on one side.

    With a fraction above 0 and two or more distinct records, each side gets at least one.
    """
    distinct = np.unique(keys)
    if fraction == 0 or len(distinct) < 2:
        return np.zeros(len(keys), dtype=bool)
    limit = min(max(int(fraction * 2**62), int(distinct[0]) + 1), int(distinct[-1]))
    return keys < limit


def _report_bad(sources: list[Source], cfg: DataConfig, quarantine: Path | None) -> None:
    bad = [row for source in sources for row in source.entry.bad]
    if quarantine is not None:
        if bad:
            write_quarantine(bad, quarantine)
        else:
            quarantine.unlink(missing_ok=True)  # of an earlier run with other data
    where = quarantine if bad else None
    for source in sources:
        enforce(source.entry.bad, source.entry.records, cfg.max_bad_fraction, where)
    if bad:
        total = sum(source.entry.records for source in sources)
        logger.warning(
            "%d of %d rows were set aside%s; the first: %s: %s",
            len(bad),
            total,
            f" in {quarantine}" if quarantine else "",
            bad[0].where,
            bad[0].message,
        )


def _no_rows(source: Source, split: str) -> str:
    return f"no {source.format} rows are left for {split}: add data or change data.heldout_fraction"


def _nothing_shipped(data_format: str) -> str:
    if data_format in SHIPPED_FORMATS:
        return (
            f"the shipped {data_format} data set is missing: give data.path (--data FILE), or "
            "build it with 'python -m tools.embedded'"
        )
    return f"no {data_format} data set is shipped: give data.path (--data FILE)"
