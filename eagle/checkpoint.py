"""Heads on disk: the published EAGLE layout, written so that a kill at any moment leaves a good
copy.

A head is a folder: `model.safetensors` (exactly the keys of the head's `state_dict()`), a flat
`config.json`, and `eagle.json`, which says what the head belongs to. Other projects' folders are
read as `eagle.heads` says. Knows nothing of training.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .errors import EagleError
from .heads.configs import DTYPES, own_config
from .heads.head import FINAL, DraftHead, HeadConfig, make_head
from .heads.read import read_folder
from .heads.read import read_json as read_json
from .loading import differences, find_folder, resolve_dtype
from .target import Target, decoder_layers

NAMES = DTYPES


def save_head(head: DraftHead, path: str | Path, provenance: dict | None = None) -> Path:
    """Write `head` (in its own dtype, every option it has) and what it belongs to into the folder
    `path`, atomically, in the `eagle` format."""
    config = own_config(head.config, head.fc.weight.dtype)
    return save_folder(path, head.state_dict(), config, head.config.feature_layers, provenance)


def save_folder(
    path: str | Path,
    state: dict[str, torch.Tensor],
    config: dict,
    feature_layers: Sequence[int],
    provenance: dict | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """A head's folder with these tensors and this config.json, whole or not at all. check: looks at
    the folder before it gets its name, and may add to it. feature_layers: entering-layer ids."""
    path = Path(path)
    # a copy where two names share memory, which safetensors does not write
    seen: set[int] = set()
    state = {k: _alone(v.detach().cpu().contiguous(), seen) for k, v in state.items()}
    with atomic_dir(path) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        layers = {"feature_layers": list(feature_layers), "convention": "entering"}
        write_json(folder / "eagle.json", {**layers, **(provenance or {}), **layers})
        require_equal(load_file(folder / "model.safetensors"), state, path)
        if check is not None:
            check(folder)
    return path


def _alone(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    where = tensor.untyped_storage().data_ptr()
    if where in seen:
        return tensor.clone()
    seen.add(where)
    return tensor


def require_equal(
    read: dict[str, torch.Tensor], written: dict[str, torch.Tensor], path: Path
) -> None:
    """What was read back is bit for bit what was written; else the disk lied."""
    for key in sorted(read.keys() | written.keys()):
        a, b = read.get(key), written.get(key)
        same = a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape
        if not same or not torch.equal(_bytes(a), _bytes(b)):
            raise EagleError(
                f"{path}: {key} read back differs from what was written; check the disk"
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


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
    layers.
    """
    published = read_folder(find_folder(path, "head"), format)
    L = None if target is None else len(target.layers)
    layers = published.layers(L, layer_ids, convention)
    embedding = None if target is None else target.embed.weight
    config, state = published.parse(layers, embedding)
    if target is not None:
        require_fit(published.path, config, target)
    head = build(config, state)
    provenance = published.provenance
    if target is not None:
        _warn_if_foreign(published.path, provenance, target)
    dtype = resolve_dtype(dtype)
    return head.to(device=device, dtype=None if dtype == "auto" else dtype), provenance


def build(config: HeadConfig, state: dict[str, torch.Tensor]) -> DraftHead:
    """state: exactly the head's keys; its dtypes are kept."""
    with torch.device("meta"):
        head = make_head(config)
    head.load_state_dict(state, strict=True, assign=True)
    return head


def require_fit(path: Path, config: HeadConfig, target: Target) -> None:
    """Refuse a head whose shapes or vocabulary are another target's."""
    hidden = target.config.hidden_size
    pairs = [
        ("target hidden size", config.target_hidden_size, hidden),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise EagleError(
                f"the head {path} does not belong to {target.name}: its {what} is {ours}, "
                f"the target's is {theirs}; use a head trained for this target"
            )
    L = len(target.layers)
    if any(not 0 <= i <= L and i != FINAL for i in config.feature_layers):
        raise EagleError(
            f"the head {path} reads layers {list(config.feature_layers)}, {target.name} has {L}; "
            "use a head trained for this target"
        )


def _warn_if_foreign(path: Path, provenance: dict, target: Target) -> None:
    recorded = {**provenance, **(provenance.get("target") or {})}
    said = differences(recorded, target.identity)
    if said:
        warnings.warn(
            f"the head {path}: {'; '.join(said)}. Output stays the target's own, fewer drafts may be accepted; "
            "a short run of `python -m train.main --init_head HEAD` with this target adapts the head",
            stacklevel=4,
        )


@torch.no_grad()
def target_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the architecture and of sampled weights: equal for one checkpoint in fp32 and in
    bf16.
    """
    config = model.config.get_text_config()
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    digest = hashlib.sha256(repr([(n, getattr(config, n, None)) for n in names]).encode())
    layers = decoder_layers(model.get_decoder())
    modules = [("embed", model.get_input_embeddings()), ("first", layers[0]), ("last", layers[-1])]
    for prefix, module in modules:
        for name, weight in sorted(module.named_parameters()):
            if "lora_" in name or not weight.is_floating_point():
                continue
            flat = weight.detach().reshape(weight.shape[0], -1)
            rows = torch.linspace(0, flat.shape[0] - 1, 8).long().to(flat.device)
            sample = flat[rows, :64].to(torch.bfloat16).cpu().contiguous()
            digest.update(
                f"{prefix}.{name.replace('base_layer.', '')}{tuple(weight.shape)}".encode()
            )
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Fill a sibling temporary folder; on success it is synced and takes the place of `path` in one
    step.

    A kill leaves the old folder or the new one. Where the file system cannot exchange two names,
      there is a moment
    between two renames: a kill then leaves the old folder under the name at which
      `loading.standing` looks, and the
    next writer puts it right. Readers change nothing.
    """
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
    """Where a process id means what it means here: this boot of this host, and its namespace of
    ids.
    """
    facts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with suppress(OSError):
            facts.append(read())
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
    """Let two names change places in one step; False where the system or the file system has no
    such thing.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
