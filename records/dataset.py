"""Config -> tokenised data: files, cache, quarantine, split and mixture put together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.schema import DataConfig, MixtureSource
from eagle.errors import EagleError
from records.cache import CacheEntry, load_or_build
from records.chat import warn_without_end
from records.mixture import MixtureDataset, RoundRobin
from records.quarantine import BadRow, enforce, name_unused, write_quarantine
from records.render import make_renderer
from records.sources import SHIPPED_FORMATS, resolve, shipped

logger = logging.getLogger("records")


class Source:
    """The rows of one format that belong to a split, read from the cache's memory map. `number` is
    its place in a mixture, `name` what metrics call it, `loss_weight` of its rows."""

    def __init__(
        self, entry: CacheEntry, data_format: str, indices: np.ndarray, files: list[Path]
    ) -> None:
        self.format, self.indices, self.entry, self.files = data_format, indices, entry, files
        self.number, self.name, self.loss_weight = 0, data_format, 1.0
        self.lengths = pc.list_value_length(entry.table.column("input_ids")).to_numpy()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        known = {name: self._cell(name, index) for name in ("input_ids", "loss_mask")}
        of = {"format": self.format, "source": self.number, "loss_weight": self.loss_weight}
        return known | of

    def _cell(self, name: str, index: int) -> Any:
        return self.entry.table.column(name)[int(self.indices[index])].as_py()

    def length(self, index: int) -> int:
        """Tokens of a row, known without reading it."""
        return int(self.lengths[self.indices[index]])

    def where(self, index: int) -> str:
        """FILE:LINE of the record that a row was made of."""
        return f"{self.files[self._cell('file', index)]}:{self._cell('line', index)}"

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64: how often each token is a supervised target of these rows."""
        ids, mask = self.column("input_ids"), self.column("loss_mask")
        return np.bincount(ids[mask == 1], minlength=vocab_size)[:vocab_size]

    def token_rows(self) -> list[np.ndarray]:
        """Token ids [T] of each row."""
        ends = self.lengths[self.indices].cumsum()
        return np.split(self.column("input_ids"), ends)[: len(self)]

    def column(self, name: str) -> np.ndarray:
        """Of this split's rows, lists end to end."""
        column = self.entry.table.column(name)
        if not pa.types.is_list(column.type):
            return column.to_numpy()[self.indices]
        chosen = np.zeros(len(self.lengths), dtype=bool)
        chosen[self.indices] = True
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return values[np.repeat(chosen, self.lengths)]


class TokenizedData:
    """Rows by index: `input_ids` and `loss_mask` (list[int]), `format`, and the number of their
    `source` and its `loss_weight`. `stats` counts rows, truncated, tokens and supervised_tokens of
    this split, records and bad of its files; `bad_rows` names each rejected row."""

    def __init__(self, sources: list[Source], order: Any) -> None:
        self.sources, self.order, self.shuffled = sources, order, order.shuffled
        self.paths = [path for source in sources for path in source.files]
        self.bad_rows: list[BadRow] = [row for s in sources for row in s.entry.bad]
        self.cache_hit = all(source.entry.cache_hit for source in sources)
        masks = [source.column("loss_mask") for source in sources]
        self.stats: dict[str, Any] = {
            "rows": sum(map(len, sources)),
            "records": sum(source.entry.records for source in sources),
            "bad": len(self.bad_rows),
            "truncated": sum(int(s.column("truncated").sum()) for s in sources),
            "tokens": sum(map(len, masks)),
            "supervised_tokens": sum(int(mask.sum(dtype=np.int64)) for mask in masks),
            "cache_hit": self.cache_hit,
        }

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.order[index]

    def set_epoch(self, epoch: int) -> None:
        """New order for a mixture; a single source keeps its order (the loop shuffles it)."""
        if self.shuffled:
            self.order.set_epoch(epoch)

    def length(self, index: int) -> int:
        """Tokens of a row, known without reading it."""
        source, row = self.order.locate(index)
        return self.sources[source].length(row)

    def where(self, index: int) -> str:
        """FILE:LINE of the record that a row was made of."""
        source, row = self.order.locate(index)
        return self.sources[source].where(row)

    def require_ids_below(self, vocab_size: int) -> None:
        """Refuse rows with an id that the target has no embedding for, and name the first."""
        for source in self.sources:
            ids = source.column("input_ids")
            if len(found := ids[ids >= vocab_size]):
                row = next(n for n in range(len(source)) if found[0] in source[n]["input_ids"])
                said = (
                    f"{source.where(row)}: token id {found[0]} is outside the target's vocabulary"
                )
                raise EagleError(f"{said} of {vocab_size}; tokenise with the target's tokenizer")

    @property
    def content(self) -> list[int]:
        """A hash of the token ids of each row, of this process alone."""
        return [hash(ids.tobytes()) for source in self.sources for ids in source.token_rows()]

    @property
    def digest(self) -> str:
        """A hash of the records behind the rows, in order, and of how a mixture is drawn."""
        digest = hashlib.sha256(repr(getattr(self.order, "plan", None)).encode())
        for source in self.sources:
            digest.update(source.column("key").tobytes())
        return digest.hexdigest()[:16]

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64: how often each token is a supervised target in an epoch."""
        rows = getattr(self.order, "counts", [len(source) for source in self.sources])
        counts = np.zeros(vocab_size, dtype=np.float64)
        for source, seen in zip(self.sources, rows, strict=True):
            counts += source.token_counts(vocab_size) * (seen / len(source))
        return np.rint(counts).astype(np.int64)


def load_dataset_for(
    cfg: DataConfig, tokenizer: Any, *, split: str = "train", out_dir: str | Path | None = None
) -> TokenizedData:
    """Tokenised rows of `cfg` for `split` (train or eval). Rejected rows are written to
    `out_dir/quarantine.jsonl` (`quarantine_eval.jsonl`). Raises EagleError for missing or empty
    data, and above `cfg.max_bad_fraction`."""
    assert split in ("train", "eval"), split
    given, mixed = [cfg], cfg.format == "mixed"
    if mixed:
        given = cfg.mixture or [MixtureSource(format=name) for name in SHIPPED_FORMATS]
    sources = [_source(cfg, entry, tokenizer, split) for entry in given]
    _report_bad(sources, cfg.max_bad_fraction, split, out_dir)
    for source in sources:
        if len(source) == 0:
            raise EagleError(f"no {source.format} rows are left for {split}: add data")
    if mixed:
        _tell_apart(sources, given)
    order = RoundRobin(sources)
    if mixed and split == "train":
        order = MixtureDataset(sources, [entry.weight for entry in given], cfg.seed)
    data = TokenizedData(sources, order)
    if cut := data.stats["truncated"]:
        said = f"{cut} of {data.stats['rows']} {split} rows did not fit in data.max_length="
        logger.warning("%s%d and were cut", said, cfg.max_length)
    return data


def _source(
    cfg: DataConfig, given: DataConfig | MixtureSource, tokenizer: Any, split: str
) -> Source:
    """One format's rows of a split."""
    renderer = make_renderer(given.format, cfg, tokenizer)
    carve = not given.eval_paths  # are held-out rows taken out of the files?
    if split == "eval" and given.eval_paths:
        files = resolve(given.eval_paths, given.format)
    elif given.paths is not None:
        files = resolve(given.paths, given.format)
    else:
        held_out = shipped(given.format, "eval")
        carve = carve and held_out is None
        found = held_out if split == "eval" and held_out else shipped(given.format, "train")
        if found is None:
            raise EagleError(f"no {given.format} data set is shipped: give data.path (--data FILE)")
        files = [found]
    entry = load_or_build(files, given.format, cfg, tokenizer, renderer)
    if split == "train" or not carve:  # else it was said of the same file
        for number, counts in entry.unused.items():
            name_unused(counts, files[number], given.format)
        warn_without_end(given.format, cfg.instruction_template, tokenizer)
    keys = entry.table.column("key").to_numpy()[entry.good]
    held = held_out_rows(keys, cfg.heldout_fraction if carve else 0)
    if carve and split == "eval" and not held.any() and len(keys):
        raise EagleError(
            f"{files[0]}: no rows can be held out of {len(np.unique(keys))} distinct rows at "
            f"data.heldout_fraction={cfg.heldout_fraction:g}; give data.eval_path"
        )
    wanted = held if carve and split == "eval" else ~held
    return Source(entry, given.format, entry.good[wanted], files)


def _tell_apart(sources: list[Source], given: list[MixtureSource]) -> None:
    """Number, weight and unique name of each source of a mixture."""
    names: set[str] = set()
    for number, (source, entry) in enumerate(zip(sources, given, strict=True)):
        source.number, source.loss_weight = number, entry.loss_weight
        source.name, n = entry.name or entry.format, 1
        while source.name in names:
            n += 1
            source.name = f"{entry.name or entry.format} {n}"
        names.add(source.name)


def held_out_rows(keys: np.ndarray, fraction: float) -> np.ndarray:
    """True for held-out rows; rows of one key, which equal records have, stay on one side. Of two
    or more distinct records each side gets one at least, unless the fraction is 0.

    The key alone decides, so that a record keeps its side whatever is added to the data, unless
    that is off by more than a quarter of what is wanted because some records have many rows. Then
    records are taken in the order of their keys as far as they fit, those of many rows last: near
    the limit, a few may change sides when rows are added."""
    distinct, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if fraction == 0 or len(distinct) < 2:
        return np.zeros(len(keys), dtype=bool)
    limit = min(max(int(fraction * 2**62), int(distinct[0]) + 1), int(distinct[-1]))
    held, wanted = distinct < limit, fraction * len(keys)
    if sizes.max() > 1 and abs(sizes[held].sum() - wanted) > wanted / 4:
        held[:], left = False, wanted
        for n in np.lexsort((distinct, sizes > wanted / 10))[:-1]:
            if sizes[n] <= left + 0.5:
                held[n], left = True, left - sizes[n]
            if left < 0.5:
                break
        smallest = np.argmin(np.where(held, len(keys), sizes))
        if not held.any() or (abs(left - sizes[smallest]) < left and held.sum() < len(held) - 1):
            held[smallest] = True
    return held[group]


def tell_shared(train: Sequence, heldout: Sequence) -> None:
    """A warning where held-out rows are also trained on, in other records or another file. Both:
    a hash of what each row holds."""
    if shared := int(np.isin(heldout, train).sum()):
        said = (
            "%d of %d held-out rows are also trained on, as duplicates in other records: what is "
        )
        said += "measured on them is too good; leave duplicates out"
        logger.warning(said, shared, len(heldout))


def _report_bad(
    sources: list[Source], max_bad_fraction: float, split: str, out_dir: str | Path | None
) -> None:
    bad = [row for source in sources for row in source.entry.bad]
    where = None
    if out_dir is not None:
        path = Path(out_dir) / f"quarantine{'' if split == 'train' else '_eval'}.jsonl"
        path.unlink(missing_ok=True)  # of an earlier run with other data
        if bad:
            write_quarantine(bad, path)
            where = path
    for source in sources:
        enforce(source.entry.bad, source.entry.records, max_bad_fraction, where)
    if bad:
        said = f"{len(bad)} rows were set aside" + (f" in {where}" if where else "")
        logger.warning("%s; the first: %s: %s", said, bad[0].where, bad[0].message)
