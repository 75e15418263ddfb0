"""A training run on disk: where it lives, its checkpoints, and which of them is newest and best.

    OUTPUT/config.yaml  metrics.jsonl  summary.json
    OUTPUT/checkpoints/step-N/head/            the head, published layout
    OUTPUT/checkpoints/step-N/state.safetensors  fp32 master weights, optimizer state, generator states
    OUTPUT/checkpoints/step-N/state.json       step, rows seen, time, what the run was
    OUTPUT/checkpoints/latest, best            names of checkpoints
    OUTPUT/head/                               the head to use

Folders appear whole or not at all; a pointer is written after the folder it names.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle.checkpoint import (
    atomic_dir,
    atomic_write_text,
    recover,
    require_equal,
    save_head,
    write_json,
)
from eagle.errors import EagleError
from eagle.head import Eagle3Head

STEP_NAME = re.compile(r"step-(\d+)")


@dataclass
class TrainState:
    """`info` is state.json: step, rows_seen, elapsed, identity, evaluations …"""

    info: dict
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    path: Path | None = None


def choose_output(output: str | None, data_format: str, resume: str | None) -> Path:
    """The run's folder. Without a name: `runs/head-FORMAT`, numbered when taken; resuming takes the last."""
    if resume not in (None, "auto"):
        return Path(output) if output else _run_of(Path(resume))
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and not path.is_dir():
            raise EagleError(f"--output {path} is a file; name a folder")
        if resume is None and holds_run(path):
            raise EagleError(
                f"{path} already holds a run; continue it with --resume, or choose another --output"
            )
        return path
    base = Path("runs") / f"head-{data_format}"
    names = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000))]
    if resume is not None:
        taken = [path for path in names if holds_run(path)]
        return taken[-1] if taken else base
    return next(path for path in names if not holds_run(path))


def holds_run(path: Path) -> bool:
    return (path / "summary.json").exists() or (path / "head").exists() or bool(checkpoints(path))


def _run_of(path: Path) -> Path:
    """The run folder of a checkpoint folder; a run folder is its own."""
    return path.parent.parent if STEP_NAME.fullmatch(path.name) else path


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folder = output / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := STEP_NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found) if (p / "state.json").exists()]


def pointed(output: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names, if both are there."""
    pointer = output / "checkpoints" / name
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    return path if (path / "state.json").exists() else None


def save_checkpoint(output: Path, state: TrainState, head: Eagle3Head, provenance: dict) -> Path:
    """Write `checkpoints/step-N` whole, then point `latest` at it."""
    path = output / "checkpoints" / f"step-{state.info['step']}"
    tensors = {f"weights/{k}": v for k, v in state.weights.items()}
    tensors |= {f"optimizer/{k}": v for k, v in state.optimizer.items()}
    tensors |= {f"rng/{k}": v for k, v in state.rng.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    with atomic_dir(path) as folder:
        save_head(head, folder / "head", provenance)
        save_file(tensors, folder / "state.safetensors")
        require_equal(load_file(folder / "state.safetensors"), tensors, path)
        write_json(folder / "state.json", state.info)
    atomic_write_text(path.parent / "latest", path.name + "\n")
    return path


def load_checkpoint(path: Path) -> TrainState:
    """Raises EagleError when a file is missing or damaged."""
    try:
        info = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise EagleError(
            f"the checkpoint {path} cannot be read ({error}); resume from another one"
        ) from error
    parts: dict[str, dict] = {"weights": {}, "optimizer": {}, "rng": {}}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return TrainState(info, **parts, path=path)


def find_checkpoint(output: Path, resume: str) -> TrainState | None:
    """`auto`: the newest readable checkpoint of the run, None when there is none; else the folder named."""
    if resume != "auto":
        path = Path(resume).expanduser()
        if STEP_NAME.fullmatch(path.name):
            return load_checkpoint(path)
        if not checkpoints(path):
            raise EagleError(
                f"--resume {path}: no checkpoint there; give a run folder or one of its step-N folders"
            )
        output = path
    folder = output / "checkpoints"
    for stale in list(folder.glob(".step-*")) if folder.is_dir() else []:
        recover(folder / stale.name[1:].split(".", 1)[0])
    newest = checkpoints(output)[::-1]
    latest = pointed(output, "latest")
    if latest is not None and latest in newest:
        newest = [latest, *(p for p in newest if p != latest)]
    for place, path in enumerate(newest):
        try:
            return load_checkpoint(path)
        except EagleError:
            if place + 1 == len(newest):
                raise
    return None


def prune(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the best and the latest stay."""
    safe = {pointed(output, "best"), pointed(output, "latest")}
    for path in checkpoints(output)[:-keep]:
        if path not in safe:
            shutil.rmtree(path, ignore_errors=True)


def rng_state() -> tuple[dict[str, torch.Tensor], dict]:
    """Generator states of torch, numpy and python: tensors, and the rest as JSON."""
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {
        "numpy": [kind, int(pos), int(has_gauss), float(cached)],
        "python": [version, gauss],
    }


def set_rng_state(tensors: dict[str, torch.Tensor], rest: dict) -> None:
    torch.set_rng_state(tensors["torch"])
    kind, pos, has_gauss, cached = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), pos, has_gauss, cached))
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def require_same_run(state: TrainState, identity: dict) -> None:
    """A resumed run must have the model and data it began with; learning settings may change."""
    before = state.info.get("identity", {})
    changed = [k for k in identity if before.get(k) != identity[k]]
    if changed:
        key = changed[0]
        raise EagleError(
            f"{state.path} belongs to a run with {key}={before.get(key)!r}, this one has {identity[key]!r}; "
            "resume with the settings of that run, or start a new one with another --output"
        )


def require_writable(path: Path) -> None:
    """Make the folder, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EagleError(
            f"cannot write to {path}: {error.strerror}; choose another --output"
        ) from error


def write_config(output: Path, cfg) -> None:
    """The whole config, defaults included: `--config OUTPUT/config.yaml` repeats the run."""
    import yaml

    values = cfg.model_dump(mode="json")
    values["train"].pop("resume", None)
    atomic_write_text(output / "config.yaml", yaml.safe_dump(values, sort_keys=False))
