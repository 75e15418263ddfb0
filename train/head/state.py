"""A training run on disk: where it lives, its checkpoints, and which of them is newest and best.

    OUTPUT/config.yaml  metrics.jsonl  summary.json OUTPUT/checkpoints/step-N/head/            the
    head, published layout OUTPUT/checkpoints/step-N/state.safetensors  fp32 master weights,
    optimizer state, generator states,
                                               the draft vocabulary
    OUTPUT/checkpoints/step-N/state.json       step, rows seen, evaluations, what the run was, the
    digest of
                                               state.safetensors
    OUTPUT/checkpoints/latest, best            names of checkpoints
    OUTPUT/head/                               the head to use

Folders appear whole or not at all; a pointer is written after the folder it names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle.checkpoint import atomic_dir, atomic_write_text, require_equal, save_head, write_json
from eagle.errors import EagleError
from eagle.files import tidy
from eagle.heads.head import DraftHead

logger = logging.getLogger("train.head")

STEP_NAME = re.compile(r"step-(\d+)")
PARTS = ("weights", "optimizer", "rng", "vocabulary")
NEEDED = ("step", "identity", "rng", "digest")


@dataclass
class TrainState:
    """`info` is state.json: step, rows_seen, elapsed, identity, evaluations …

    vocabulary: `draft_ids` [D] int64, the target id of each draft id; a resumed run must not choose
    anew.
    """

    info: dict
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    vocabulary: dict[str, torch.Tensor] = field(default_factory=dict)
    path: Path | None = None


def choose_output(output: str | None, data_format: str, resume: str | None) -> Path:
    """The run's folder. Without a name: `runs/head-FORMAT`, numbered when taken; resuming takes the
    last.
    """
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


def step_of(checkpoint: Path) -> int:
    return int(STEP_NAME.fullmatch(checkpoint.name)[1])


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folder = output / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / "state.json").exists()), key=step_of)


def pointed(output: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names, if both are there."""
    pointer = output / "checkpoints" / name
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    return path if (path / "state.json").exists() else None


def save_checkpoint(output: Path, state: TrainState, head: DraftHead, provenance: dict) -> Path:
    """Write `checkpoints/step-N` whole, then point `latest` at it."""
    path = output / "checkpoints" / f"step-{state.info['step']}"
    tensors = {
        f"{part}/{k}": v.contiguous() for part in PARTS for k, v in getattr(state, part).items()
    }
    with full_disk_told(output), atomic_dir(path) as folder:
        save_head(head, folder / "head", provenance)
        save_file(tensors, folder / "state.safetensors")
        require_equal(load_file(folder / "state.safetensors"), tensors, path)
        digest = _digest(folder / "state.safetensors")
        write_json(folder / "state.json", {**state.info, "digest": digest})
    with full_disk_told(output):
        atomic_write_text(path.parent / "latest", path.name + "\n")
    return path


def load_checkpoint(path: Path) -> TrainState:
    """Raises EagleError when a file is missing or damaged."""
    try:
        info = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        lacking = [key for key in NEEDED if key not in info]
        if lacking:
            raise ValueError(f"state.json lacks {', '.join(lacking)}")
        if _digest(path / "state.safetensors") != info["digest"]:
            raise ValueError("state.safetensors is not what was written")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise EagleError(
            f"the checkpoint {path} cannot be read ({error}); resume from another one"
        ) from error
    parts: dict[str, dict] = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return TrainState(info, **parts, path=path)


def find_checkpoint(output: Path, resume: str) -> TrainState | None:
    """`auto`: the newest readable checkpoint of the run, None when there is none; else the folder
    named.

    In the run that goes on, what a kill left is removed, and what is damaged, or was made after the
    checkpoint that is resumed, is set aside under another name and told. Another run is only read.
    """
    path = Path(resume).expanduser()
    named = resume != "auto" and STEP_NAME.fullmatch(path.name) is not None
    run = output if resume == "auto" else _run_of(path)
    folder = run / "checkpoints"
    own = _same(run, output)
    for stale in list(folder.glob(".step-*")) if own else []:
        tidy(folder / stale.name[1:].split(".", 1)[0])
    if named:
        state = load_checkpoint(path)
    elif resume != "auto" and not checkpoints(run):
        raise EagleError(
            f"--resume {path}: no checkpoint there; give a run folder or one of its step-N folders"
        )
    else:
        state = _newest_readable(run, own)
    if state is not None and own:
        for later in checkpoints(run):
            if step_of(later) > step_of(state.path):
                _set_aside(later, "left", f"the run goes on from {state.path.name}")
    return state


def _newest_readable(run: Path, own: bool) -> TrainState | None:
    damaged: dict[Path, str] = {}
    for path in checkpoints(run)[::-1]:
        try:
            state = load_checkpoint(path)
        except EagleError as error:
            damaged[path] = str(error)
            continue
        for other, why in damaged.items():
            _set_aside(other, "damaged", why) if own else logger.warning("%s", why)
        return state
    if damaged:
        raise EagleError(
            f"no checkpoint of {run} can be read; start a new run with another --output"
        )
    return None


def _set_aside(path: Path, word: str, why: str) -> None:
    """Rename a checkpoint so that nothing takes it for one of the run's."""
    aside = path.with_name(f"{word}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    logger.warning("%s; %s is now %s", why, path.name, aside)


def _same(a: Path, b: Path) -> bool:
    return a.expanduser().resolve() == b.expanduser().resolve()


def prune(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the best and the latest stay."""
    safe = {pointed(output, "best"), pointed(output, "latest")}
    for path in checkpoints(output)[:-keep]:
        if path not in safe:
            going = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            os.rename(path, going)  # a kill leaves no half of a checkpoint under its name
            shutil.rmtree(going, ignore_errors=True)


@contextmanager
def full_disk_told(output: Path) -> Iterator[None]:
    """A disk that takes no more becomes one line with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = re.search(r"os error (\d+)", str(error))  # how safetensors passes one on
        number = int(named[1]) if named else getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise EagleError(
            f"cannot write to {output}: {os.strerror(number)}; the checkpoints there are whole: free some space "
            "and continue with --resume"
        ) from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def rng_state() -> tuple[dict[str, torch.Tensor], dict]:
    """Generator states of torch, its CUDA devices, numpy and python: tensors, and the rest as
    JSON.
    """
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {
        "numpy": [kind, int(pos), int(has_gauss), float(cached)],
        "python": [version, gauss],
    }


def set_rng_state(tensors: dict[str, torch.Tensor], rest: dict) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
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
