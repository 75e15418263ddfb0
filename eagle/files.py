"""Files that outlive a run: written whole or not at all, checked when they are read."""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import EagleError


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Fill a sibling temporary folder; on success it is synced and takes the place of `path` in one
    step: a kill leaves the old folder or the new one. Where the file system cannot exchange two
    names, there is a moment between two renames: a kill then leaves the old folder under the name
    at which `standing` looks, and the next writer puts it right. Readers change nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path)
    temporary = _beside(path, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _fsync(item)
        _fsync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if not path.exists():
        os.rename(temporary, path)
    elif not exchange(temporary, path):
        old = _beside(path, "old")
        os.rename(path, old)
        os.rename(temporary, path)
        temporary = old
    _fsync(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def standing(folder: Path) -> Path:
    """`folder`, or what it was before where a kill came between the two renames of `atomic_dir`."""
    if folder.exists():
        return folder
    return next(iter(sorted(folder.parent.glob(f".{glob.escape(folder.name)}.old-*"))), folder)


def remove(folder: Path) -> None:
    """A kill leaves no half of it under its name; `tidy` removes what is left."""
    going = _beside(folder, "tmp")
    os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def tidy(path: Path) -> None:
    """Finish what a kill interrupted, for the writer of `path`: bring a folder back that was moved
    away for its successor, and remove what processes of this machine, now gone, were writing.
    Others' are never touched."""
    for kind in ("old", "tmp"):
        for item in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            machine, _, pid = item.name.rpartition("-")
            if not machine.endswith(f".{kind}-{_machine()}") or _alive(pid):
                continue
            if kind == "old" and not path.exists():
                os.rename(item, path)
            else:
                shutil.rmtree(item, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A sibling's name that is this process's own, among all machines that may share the disk."""
    return path.with_name(f".{path.name}.{kind}-{_machine()}-{os.getpid()}")


@functools.cache
def _machine() -> str:
    """Where a process id means what it means here: this boot of this host, and its namespace."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where that is not to be had."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file `path` by `text`: readers see the old text or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, kind: type[BaseModel] | None = None) -> dict:
    """The object in a file. kind: what it must be like; it may hold more."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        said = f"cannot read {path}: {error.strerror}"
        raise EagleError(f"{said}; a head folder needs {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise EagleError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise EagleError(f"{path} must hold a JSON object; restore the file")
    try:
        if kind is not None:
            kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise EagleError(f"{path}: {said}; restore the file") from error
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EagleError(f"{path} is missing or damaged ({error}); restore the file") from error


def require_numbers(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse weights with a NaN or an infinity among them."""
    for name, value in tensors.items():
        wide = value.is_floating_point() and value.dtype.itemsize > 1
        if wide and not value.isfinite().all():
            raise EagleError(f"{path}: {name} holds NaN or infinity; restore it, or train it anew")


def weights_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and every value."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(raw_bytes(value).numpy())
    return digest.hexdigest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(raw_bytes(a), raw_bytes(b))


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def require_equal(
    read: dict[str, torch.Tensor], written: dict[str, torch.Tensor], path: Path
) -> None:
    """What was read back is bit for bit what was written; else the disk lied."""
    for key in sorted(read.keys() | written.keys()):
        if key not in read or key not in written or not same_bits(read[key], written[key]):
            raise EagleError(
                f"{path}: {key} read back differs from what was written; check the disk"
            )
