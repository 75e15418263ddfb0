"""What the target computes for each training row, kept on disk: the format, and reading it back.

    DIR/index.json                  what the features belong to, and each row's place
    DIR/shard-00000.safetensors     features [N, F] and hidden [N, H] of the shard's rows, end to
    end

A row is known by a hash of its token ids: order, mixture, batches and loss masks may change, tokens
may not. The index is written first and never changes; shards follow, each whole or not at all.
`train.prepare features` writes them (train/prepare/features.py).

B rows, T tokens, N tokens of a shard, F features (3 x hidden), H hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.checkpoint import NAMES
from eagle.errors import EagleError
from eagle.target import Target

INDEX = "index.json"
VERSION = 1
OPEN_SHARDS = 64
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Belongs:
    """What decides the numbers, besides the tokens. See `eagle.loading` for its first four."""

    target: str
    fingerprint: str
    adapter: str | None
    quantization: str
    dtype: str
    feature_layers: list[int]
    hidden_size: int

    @classmethod
    def to(cls, target: Target) -> Belongs:
        """Of a target whose feature layers are set."""
        who = target.identity
        return cls(
            target.name,
            who["fingerprint"],
            who["adapter"],
            who["quantization"],
            NAMES[target.dtype],
            list(target.feature_layers),
            target.config.hidden_size,
        )

    @property
    def bytes_per_token(self) -> int:
        return 4 * self.hidden_size * DTYPES[self.dtype].itemsize


@dataclass
class Index:
    """shards: {file, rows, tokens} each. rows: key -> (shard, offset in tokens, tokens). data: of
    which settings and files the rows were made. command: what wrote it, without --output."""

    belongs: Belongs
    data: dict
    command: str
    shards: list[dict] = field(default_factory=list)
    rows: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def id(self) -> str:
        """Changes when any number or place may change; each shard carries it."""
        kept = asdict(self.belongs)
        kept.pop("target")  # a name: the fingerprint says what it is
        text = json.dumps([VERSION, kept, self.shards, self.rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_json(self) -> str:
        head = {"version": VERSION, **asdict(self)}
        rows = head.pop("rows")
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(place)}" for key, place in rows.items())
        return json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + lines + "\n}}\n"

    @classmethod
    def read(cls, folder: Path) -> Index:
        path = folder / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("version") != VERSION:
                raise EagleError(f"{path} has another version; prepare the features again")
            found["belongs"] = Belongs(**found["belongs"])
            found["rows"] = {key: tuple(place) for key, place in found["rows"].items()}
            return cls(**found)
        except OSError as error:
            raise EagleError(
                f"no features in {folder}: cannot read {INDEX} ({error.strerror}); write them with "
                "python -m train.prepare features --output DIR"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, EagleError):
                raise
            raise EagleError(
                f"{path} is damaged ({error}); delete {folder} and prepare the features again"
            ) from error


def row_key(ids) -> str:
    """ids [T], an array or list of whole numbers -> 24 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids).astype("<i4").tobytes(), digest_size=12).hexdigest()


def token_rows(data) -> Iterator[np.ndarray]:
    """Token ids [T] of every row of every source of a `TokenizedData`, sources one after the
    other.
    """
    for source in data.sources:
        table = source.entry.table.select(source.indices).select_columns(["input_ids"])
        for batch in table.with_format("arrow").iter(batch_size=1000):
            column = batch["input_ids"].combine_chunks()
            ids, ends = column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())
            yield from np.split(ids, ends[:-1])


class FeatureStore:
    """Stands where a `Target` stands in training: `hidden_and_features` of rows that were
    prepared.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.index = Index.read(self.folder)
        self._open: OrderedDict[int, safe_open] = OrderedDict()
        missing = [s["file"] for s in self.index.shards if not (self.folder / s["file"]).exists()]
        if missing:
            raise EagleError(
                f"{self.folder} lacks {len(missing)} of {len(self.index.shards)} shards "
                f"(first {missing[0]}); go on writing them with: {self.repair}"
            )
        for number in range(len(self.index.shards)):
            self._shard(number)

    @property
    def repair(self) -> str:
        return f"{self.index.command} --output {self.folder}"

    def _shard(self, number: int):
        """The open shard; EagleError where it is cut short or belongs to another index."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / self.index.shards[number]["file"]
        reason = damage(path, self.index, number)
        if reason:
            raise EagleError(f"{path} {reason}; write it again with: {self.repair}")
        if len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = safe_open(path, "pt")
        return self._open[number]

    def require_fit(self, run: Belongs, data, cfg) -> None:
        """Refuse features of another target, of other layers or numbers, or without a row of
        `data`.

        cfg: the run's `DataConfig`, to say which setting differs."""
        ours, made = asdict(self.index.belongs), asdict(run)
        for name, remedy in _DIFFERENCES.items():
            if ours[name] != made[name]:
                shown = [str(values[name])[:40] for values in (ours, made)]
                if name in ("fingerprint", "adapter"):
                    shown = [
                        f"{v} of {x['target']}" for v, x in zip(shown, (ours, made), strict=True)
                    ]
                raise EagleError(
                    f"the features in {self.folder} belong to another target: {name.replace('_', ' ')} "
                    f"{shown[0]}, this run has {shown[1]}; {remedy}, or prepare features for this run"
                )
        absent = total = 0
        for ids in token_rows(data):
            total += 1
            absent += row_key(ids) not in self.index.rows
        if absent:
            raise EagleError(
                f"the features in {self.folder} lack {absent} of the {total} rows of this run's data"
                f"{_told_apart(self.index.data, data_settings(cfg, data))}; train on the data they were "
                "made of, or prepare features of this data in another folder"
            )

    def hidden_and_features(
        self, ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, T], attention_mask [B, T] 1 on real tokens, padding on the right -> hidden [B, T,
        H] and features [B, T, F] in the target's dtype, on the device of `ids`; zeros on
        padding."""
        belongs, (B, T) = self.index.belongs, ids.shape
        shape = {"hidden": belongs.hidden_size, "features": 3 * belongs.hidden_size}
        out = {k: torch.zeros(B, T, n, dtype=DTYPES[belongs.dtype]) for k, n in shape.items()}
        tokens, lengths = ids.cpu().numpy(), attention_mask.sum(1).tolist()
        for b, length in enumerate(lengths):
            place = self.index.rows.get(row_key(tokens[b, :length]))
            if place is None:
                raise EagleError(
                    f"the features in {self.folder} lack a row of this batch ({length} tokens); "
                    "prepare features of this data in another folder"
                )
            shard, offset, _ = place
            for name, tensor in out.items():
                part = self._shard(shard).get_slice(name)[offset : offset + length]
                tensor[b, :length] = part
        return out["hidden"].to(ids.device), out["features"].to(ids.device)


_DIFFERENCES = {
    "fingerprint": "set model.base to that target",
    "adapter": "use that adapter",
    "quantization": "load the target as it was then",
    "feature_layers": "set model.feature_layers to those",
    "dtype": "set model.dtype to that one",
    "hidden_size": "set model.base to that target",
}


def damage(path: Path, index: Index, number: int) -> str | None:
    """What is wrong with a shard's file, None when it is whole (its length and header are looked
    at).
    """
    tokens, H = index.shards[number]["tokens"], index.belongs.hidden_size
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("index") != index.id:
                return "belongs to other features"
            shapes = [file.get_slice(name).get_shape() for name in ("features", "hidden")]
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        return f"is damaged or cut short ({path.stat().st_size} bytes: {reason})"
    if shapes != [[tokens, 3 * H], [tokens, H]]:
        return f"holds {shapes} instead of {tokens} tokens"
    return None


def data_settings(cfg, data) -> dict:
    """What made the rows: the settings that shape them, and the files."""
    names = (
        "format",
        "max_length",
        "supervise",
        "instruction_template",
        "fim_spm_rate",
        "fim_spans_per_file",
        "heldout_fraction",
        "seed",
    )
    return {
        **{name: getattr(cfg, name) for name in names},
        "files": [path.name for path in data.paths],
        "cache": [source.entry.folder.name for source in data.sources],
    }


def _told_apart(made: dict, run: dict) -> str:
    """` (made of max_length=96, this run has 256)` for what differs, without the cache's hashes."""
    parts = [
        f"{k}={made.get(k)}, this run has {run[k]}"
        for k in run
        if k != "cache" and made.get(k) != run[k]
    ]
    return f" (made of {'; '.join(parts)})" if parts else ""
