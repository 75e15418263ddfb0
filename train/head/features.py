"""What the target computes for each training row, kept on disk: the format, and reading it back.

    DIR/index.json                  what the features belong to, and each row's place
    DIR/shard-00000.safetensors     features [N, F] and hidden [N, H] of its rows, end to end

A row is known by a hash of its token ids: order, mixture, batches and loss masks may change, tokens
may not. The index is written first and never changes; shards follow, each whole or not at all
(train/prepare/features.py).

B rows, T tokens of the longest, N tokens of all rows of a shard or a batch, F features (3 x
hidden), H hidden."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.checkpoint import NAMES
from eagle.errors import EagleError
from eagle.target import Target

INDEX = "index.json"
VERSION = 2
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
        who = [target.identity[name] for name in ("fingerprint", "adapter", "quantization")]
        dtype, layers = NAMES[target.dtype], list(target.feature_layers)
        return cls(target.name, *who, dtype, layers, target.config.hidden_size)

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
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Index:
        path = folder / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("version") != VERSION:
                raise ValueError("an earlier version wrote it")
            found["belongs"] = Belongs(**found["belongs"])
            found["rows"] = {key: tuple(place) for key, place in found["rows"].items()}
            return cls(**found)
        except OSError as error:
            raise EagleError(
                f"no features in {folder}: cannot read {INDEX} ({error.strerror}); write them with "
                "python -m train.prepare features --output DIR"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EagleError(f"{path} is unusable ({error}); prepare the features again") from error


def row_key(ids) -> str:
    """ids [T], an array or list of whole numbers -> 24 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids).astype("<i4").tobytes(), digest_size=12).hexdigest()


class FeatureStore:
    """Stands where a `Target` stands in training, for rows that were prepared."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.index = Index.read(self.folder)
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        for number in range(len(self.index.shards)):
            self._shard(number)

    def _open(self, number: int):
        """EagleError where the shard is missing, cut short or of another index."""
        path = self.folder / self.index.shards[number]["file"]
        if reason := damage(path, self.index, number):
            repair = f"{self.index.command} --output {self.folder}"
            raise EagleError(f"{path} {reason}; write it again with: {repair}")
        return safe_open(path, "pt")

    def require_fit(self, run: Belongs, data, cfg) -> None:
        """Refuse features of another target, of other layers or numbers, or without a row of
        `data`. cfg: the run's `DataConfig`, to say which setting differs."""
        made, ours = asdict(self.index.belongs), asdict(run)
        for name in [name for name in ours if name != "target" and ours[name] != made[name]]:
            setting = name if name in ("adapter", "dtype", "feature_layers") else "base"
            raise EagleError(
                f"the features in {self.folder}, of {made['target']}, belong to another target: "
                f"{name.replace('_', ' ')} {made[name]}, this run has {ours[name]}; set "
                f"model.{setting} to what it was then, or prepare features for this run"
            )
        known = [row_key(ids) in self.index.rows for s in data.sources for ids in s.token_rows()]
        if not all(known):
            before, now = self.index.data, data_settings(cfg, data)
            named = [k for k in now if before.get(k) != now[k]]
            told = "; ".join(f"{k}={before.get(k)}, this run has {now[k]}" for k in named)
            raise EagleError(
                f"the features in {self.folder} lack {known.count(False)} of the {len(known)} rows "
                f"of this run's data (made of {told or 'other files'}); train on the data they "
                "were made of, or prepare features of this data in another folder"
            )

    def hidden_and_features(self, ids: torch.Tensor, lengths: list[int]) -> tuple:
        """ids [B, T], padded on the right to the longest of `lengths` -> hidden [N, H] and features
        [N, F], rows end to end, in the target's dtype, on the device of `ids`."""
        found: dict[str, list[torch.Tensor]] = {"hidden": [], "features": []}
        for tokens, length in zip(ids.cpu().numpy(), lengths, strict=True):
            place = self.index.rows.get(row_key(tokens[:length]))
            if place is None:
                raise EagleError(
                    f"the features in {self.folder} lack a row of this batch ({length} tokens); "
                    "prepare features of this data in another folder"
                )
            shard, offset, _ = place
            for name, parts in found.items():
                parts.append(self._shard(shard).get_slice(name)[offset : offset + length])
        return tuple(torch.cat(parts).to(ids.device) for parts in found.values())


SETTINGS = """format max_length supervise instruction_template fim_spm_rate fim_spans_per_file
heldout_fraction seed""".split()


def damage(path: Path, index: Index, number: int) -> str | None:
    """What its length and header say is wrong with a shard's file, None when it is whole."""
    if not path.exists():
        return "is missing"
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
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    return {**settings, "files": [path.name for path in data.paths]}
