"""Heads on disk: the published EAGLE-3 layout, written so that a kill at any moment leaves a good copy.

A head is a folder: `model.safetensors` (exactly the keys of `Eagle3Head.state_dict()`), a flat
`config.json`, and `eagle.json`, which says what the head belongs to. Knows nothing of training.

D draft vocabulary, V target vocabulary, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import EagleError
from .head import Eagle3Head, HeadConfig, default_feature_layers
from .loading import differences, resolve_dtype
from .target import Target, decoder_layers

CONVENTION = (
    "entering"  # ids count the states that enter a layer; "output" counts those that leave it
)
IDS, IDS_CONVENTION = "eagle_aux_hidden_state_layer_ids", "eagle_aux_hidden_state_convention"
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save_head(head: Eagle3Head, path: str | Path, provenance: dict | None = None) -> Path:
    """Write `head` (in its own dtype) and what it belongs to into the folder `path`, atomically."""
    path = Path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    with atomic_dir(path) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", published_config(head))
        layers = {"feature_layers": list(head.config.feature_layers), "convention": CONVENTION}
        write_json(folder / "eagle.json", {**layers, **(provenance or {})})
        require_equal(load_file(folder / "model.safetensors"), state, path)
    return path


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


def published_config(head: Eagle3Head) -> dict:
    c, dtype = head.config, NAMES[head.fc.weight.dtype]
    flat = {k: v for k, v in c.to_dict().items() if k != "feature_layers"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **flat,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        IDS: list(c.feature_layers),
        IDS_CONVENTION: CONVENTION,
    }


def load_head(
    path: str | Path,
    target: Target | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> tuple[Eagle3Head, dict]:
    """Read a head of ours or a published one -> (head, provenance; {} when none was recorded).

    dtype "auto" keeps the file's. With a `target`, a head of another shape or vocabulary is refused
    with EagleError, and one trained on other weights warned about.
    """
    path = find_folder(path)
    raw = read_json(path / "config.json")
    state = _read_weights(path)
    config = _read_config(path, raw, state, target)
    if target is not None:
        require_fit(path, config, target)
    with torch.device("meta"):
        head = Eagle3Head(config)
    state = _checked(path, head, state, target)
    head.load_state_dict(state, strict=True, assign=True)
    provenance = read_json(path / "eagle.json") if (path / "eagle.json").exists() else {}
    if target is not None:
        _warn_if_foreign(path, provenance, target)
    dtype = resolve_dtype(dtype)
    return head.to(device=device, dtype=None if dtype == "auto" else dtype), provenance


def find_folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    recover(folder)
    if folder.is_dir():
        return folder
    if (
        not folder.exists()
        and str(path).count("/") == 1
        and not str(path).startswith((".", "/", "~"))
    ):
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "model.safetensors", "pytorch_model.bin"]
        try:
            return Path(snapshot_download(str(path), allow_patterns=wanted))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise EagleError(
                f"no head folder {str(path)!r}, and the hub does not give it: {reason}"
            ) from error
    raise EagleError(
        f"no head folder {str(path)!r}; give a folder with config.json and model.safetensors"
    )


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EagleError(
            f"cannot read {path}: {error.strerror}; a head folder needs {path.name}"
        ) from error
    except ValueError as error:
        raise EagleError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise EagleError(f"{path} must hold a JSON object; restore the file")
    return value


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if (path / "model.safetensors").exists():
        try:
            return load_file(path / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise EagleError(
                f"{path / 'model.safetensors'} is damaged ({error}); restore the file"
            ) from error
    if (path / "pytorch_model.bin").exists():
        try:
            return torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # pickle, zip and runtime errors alike mean: not a file of weights
            reason = str(error).split(".")[0]
            raise EagleError(
                f"{path / 'pytorch_model.bin'} holds no plain weights ({reason})"
            ) from error
    raise EagleError(
        f"{path} has neither model.safetensors nor pytorch_model.bin; it is not a head folder"
    )


def _read_config(
    path: Path, raw: dict, state: dict[str, torch.Tensor], target: Target | None
) -> HeadConfig:
    if "midlayer.self_attn.q_proj.weight" not in state and any(
        k.startswith("layers.0.") for k in state
    ):
        raise EagleError(
            f"{path} is not in the EAGLE-3 layout (its keys begin with 'layers.0.'); convert it first"
        )
    wanted = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [k for k in wanted if not isinstance(raw.get(k), int)]
    if missing:
        raise EagleError(
            f"{path / 'config.json'} lacks {', '.join(missing)}; it is not an EAGLE-3 head's config"
        )
    values = {k: raw[k] for k in HeadConfig.names() & raw.keys() if raw[k] is not None}
    rope = raw.get("rope_parameters") or {}
    if rope:
        values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            values.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    values.setdefault("num_key_value_heads", raw["num_attention_heads"])
    values.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    values.setdefault("draft_vocab_size", raw["vocab_size"])
    values.setdefault("target_hidden_size", raw["hidden_size"])
    values["feature_layers"] = _feature_layers(path, raw, target)
    return HeadConfig(**values)


def _feature_layers(path: Path, raw: dict, target: Target | None) -> tuple[int, ...]:
    nested = (raw.get("eagle_config") or {}).get(IDS)
    ids, convention = raw.get(IDS), raw.get(IDS_CONVENTION, CONVENTION)
    if ids is None and nested is not None:
        ids, convention = nested, "output"
    if ids is None:
        if target is None:
            raise EagleError(
                f"{path / 'config.json'} names no feature layers; load it together with its target"
            )
        return default_feature_layers(len(target.layers))
    if convention not in (CONVENTION, "output") or len(ids) != 3:
        raise EagleError(
            f"{path / 'config.json'}: {IDS} must be three ids, its convention 'entering' or 'output'"
        )
    return tuple(int(i) + (convention == "output") for i in ids)


def require_fit(path: Path, config: HeadConfig, target: Target) -> None:
    """Refuse a head whose shapes or vocabulary are another target's."""
    hidden = target.config.hidden_size
    pairs = [
        ("hidden size", config.hidden_size, hidden),
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
    if any(not 0 <= i <= L for i in config.feature_layers):
        raise EagleError(
            f"the head {path} reads layers {list(config.feature_layers)}, {target.name} has {L}; "
            "use a head trained for this target"
        )


def _checked(
    path: Path, head: Eagle3Head, state: dict[str, torch.Tensor], target: Target | None
) -> dict[str, torch.Tensor]:
    """Exactly the head's keys and shapes, or EagleError naming what differs."""
    expected, state = head.state_dict(), dict(state)
    if "embed_tokens.weight" not in expected and "embed_tokens.weight" in state:
        shape = tuple(state.pop("embed_tokens.weight").shape)
        ours = (head.config.vocab_size, head.config.hidden_size)
        if shape != ours:
            raise EagleError(
                f"{path}: embed_tokens.weight has shape {list(shape)}, expected {list(ours)}"
            )
        warnings.warn(
            f"{path}: embed_tokens.weight is ignored; the head uses the target's embedding",
            stacklevel=4,
        )
    if not head.config.reduced_vocab and not state.get("d2t", torch.zeros(1)).any():
        state = {k: v for k, v in state.items() if k not in ("d2t", "t2d")}  # the identity map
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{word}: {', '.join(keys)}"
            for word, keys in (("missing", missing), ("left over", extra))
            if keys
        ]
        raise EagleError(
            f"{path} is not an EAGLE-3 head in the published layout; {'; '.join(parts)}"
        )
    wrong = [
        f"{k} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in expected.items()
        if state[k].shape != v.shape
    ]
    if wrong:
        raise EagleError(f"{path}: shapes do not fit config.json: {'; '.join(wrong)}")
    if head.config.reduced_vocab:
        state["d2t"], state["t2d"] = state["d2t"].to(torch.int64), state["t2d"].bool()
        ids = state["d2t"] + torch.arange(head.config.draft_vocab_size)
        if not torch.equal(ids.sort().values, state["t2d"].nonzero()[:, 0]):
            raise EagleError(f"{path}: d2t and t2d contradict each other; the file is damaged")
    return state


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
    """A hash of the architecture and of sampled weights: equal for one checkpoint in fp32 and in bf16."""
    config = model.config.get_text_config()
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
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
    """Fill a sibling temporary folder; on success it is synced and takes the place of `path`.

    A kill leaves the old folder, or the new one, or (between the two renames) the old one under the
    name that `recover` puts right.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
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
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Finish what a kill interrupted: bring a folder back that was moved away for its successor, and
    remove half-written ones of processes that are gone."""
    if not path.parent.is_dir():
        return
    siblings = [
        p
        for p in path.parent.iterdir()
        if p.name.startswith((f".{path.name}.tmp-", f".{path.name}.old-"))
    ]
    for item in sorted(siblings):
        if _alive(item.name.rsplit("-", 1)[1]):
            continue
        if ".old-" in item.name and not path.exists():
            os.rename(item, path)
        else:
            shutil.rmtree(item, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file `path` by `text`: readers see the old text or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
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
