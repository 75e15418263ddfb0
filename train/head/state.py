"""A checkpoint of a run that trains a head.

step-N/head/               the head, published layout
step-N/state.safetensors   fp32 master weights, optimizer and generator states, draft vocabulary
step-N/state.json          step, rows seen, evaluations, what the run was, state's sha256"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle.checkpoint import atomic_dir, require_equal, save_head, write_json
from eagle.heads.head import DraftHead
from records.card import file_hash
from train import runs
from train.runs import full_disk_told, point, unreadable

PARTS = ("weights", "optimizer", "rng", "vocabulary")


@dataclass
class TrainState:
    """`info` is state.json; vocabulary: `draft_ids` [D] int64, which a resumed run keeps."""

    info: dict
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    vocabulary: dict[str, torch.Tensor]
    path: Path | None = None


def save_checkpoint(output: Path, state: TrainState, head: DraftHead, provenance: dict) -> Path:
    """Write `checkpoints/step-N` whole, then point `latest` at it."""
    path = output / "checkpoints" / f"step-{state.info['step']}"
    parts = {part: getattr(state, part) for part in PARTS}
    tensors = {f"{part}/{k}": v.contiguous() for part in PARTS for k, v in parts[part].items()}
    with full_disk_told(output):
        with atomic_dir(path) as folder:
            save_head(head, folder / "head", provenance)
            save_file(tensors, folder / "state.safetensors")
            require_equal(load_file(folder / "state.safetensors"), tensors, path)
            digest = file_hash(folder / "state.safetensors")
            write_json(folder / "state.json", {**state.info, "digest": digest})
        point(output, "latest", path.name)
    return path


def load_checkpoint(path: Path) -> TrainState:
    """Raises EagleError when a file is missing or damaged."""
    try:
        info = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        if not {"step", "identity", "digest"} <= info.keys():
            raise ValueError("state.json is not whole")
        if file_hash(path / "state.safetensors") != info["digest"]:
            raise ValueError("state.safetensors is not what was written")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise unreadable(path, error) from error
    parts: dict[str, dict] = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return TrainState(info, **parts, path=path)


def find_checkpoint(output: Path, resume: str) -> TrainState | None:
    """The state to go on from: `runs.find_checkpoint`."""
    return runs.find_checkpoint(output, resume, load_checkpoint)[1]


def rng_state() -> dict[str, torch.Tensor]:
    """Of the generators that training draws from: torch's, and its CUDA device's."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
