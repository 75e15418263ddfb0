"""Heads on disk: a folder with `model.safetensors` (exactly the keys of the head's `state_dict()`),
a flat `config.json`, and `eagle.json`, which says what the head belongs to.

Other projects' folders are read as `eagle.heads` says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import EagleError
from .files import atomic_dir as atomic_dir
from .files import atomic_write_text as atomic_write_text
from .files import read_json as read_json
from .files import require_equal as require_equal
from .files import write_json as write_json
from .heads.configs import DTYPES, own_config
from .heads.head import DraftHead, build
from .heads.head_config import FINAL, HeadConfig
from .heads.read import read_folder
from .heads.write import save_folder
from .loading import differences, find_folder, resolve_dtype
from .loading import target_fingerprint as target_fingerprint
from .target import Target

NAMES = DTYPES


def save_head(head: DraftHead, path: str | Path, provenance: dict | None = None) -> Path:
    """Write `head` (in its own dtype, every option it has) and what it belongs to into the folder
    `path`, atomically, in the `eagle` format."""
    config = own_config(head.config, head.fc.weight.dtype)
    return save_folder(path, head.state_dict(), config, head.config.feature_layers, provenance)


def load_head(
    path: str | Path,
    target: Target | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    format: str | None = None,
    layer_ids: Sequence[int] | None = None,
    convention: str | None = None,
) -> tuple[DraftHead, dict]:
    """Read a head of ours or a published one -> (head, provenance; {} when none was recorded).

    dtype "auto" keeps the file's. With a `target`, a head of another shape or vocabulary is refused
    with EagleError, and one trained on other weights warned about; an embedding that equals the
    target's is left out. format: eagle, sglang, vllm or modelopt; detected by default. layer_ids
    and convention (entering, output, one-based) win over what the folder says of its feature
    layers."""
    published = read_folder(find_folder(path, "head"), format)
    L = None if target is None else len(target.layers)
    layers = published.layers(L, layer_ids, convention)
    config, state = published.parse(layers, None if target is None else target.embed.weight)
    provenance = published.provenance
    if target is not None:
        require_fit(published.path, config, target)
        _warn_if_foreign(published.path, provenance, target)
    dtype = resolve_dtype(dtype)
    head = build(config, state)
    return head.to(device=device, dtype=None if dtype == "auto" else dtype), provenance


def require_fit(path: Path, config: HeadConfig, target: Target) -> None:
    """Refuse a head whose shapes or vocabulary are another target's."""
    for what, ours, theirs in (
        ("target hidden size", config.target_hidden_size, target.config.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            said = f"the head {path} does not belong to {target.name}: its {what} is {ours}"
            raise EagleError(
                f"{said}, the target's is {theirs}; use a head trained for this target"
            )
    L, layers = len(target.layers), list(config.feature_layers)
    if any(not 0 <= i <= L and i != FINAL for i in layers):
        said = f"the head {path} reads layers {layers}, {target.name} has {L}"
        raise EagleError(f"{said}; use a head trained for this target")


def _warn_if_foreign(path: Path, provenance: dict, target: Target) -> None:
    recorded = {**provenance, **(provenance.get("target") or {})}
    if said := differences(recorded, target.identity):
        warnings.warn(
            f"the head {path}: {'; '.join(said)}. Output stays the target's own, fewer drafts may "
            "be accepted; a short run of `python -m train.main --init_head HEAD` with this target "
            "adapts the head",
            stacklevel=4,
        )
