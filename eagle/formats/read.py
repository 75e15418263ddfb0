"""A head's folder in any format -> its HeadConfig and tensors under our names.

Knows JSON, safetensors and `.bin` files; knows nothing of targets but the number of their layers and an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import EagleError
from ..head import FINAL, HeadConfig, default_feature_layers, make_head
from .configs import detect, is_eagle1, read_config, written_layers
from .layers import SHIFT, absent, entering_ids
from .tables import EMBEDDING, Format, table, to_ours


@dataclass(frozen=True)
class Published:
    """What a folder holds: config.json as it is, tensors under the names of its format."""

    path: Path
    raw: dict
    tensors: dict[str, torch.Tensor]
    format: Format
    provenance: dict

    @property
    def eagle1(self) -> bool:
        return is_eagle1(self.raw, self.tensors.keys())

    def layers(
        self,
        num_layers: int | None = None,
        layer_ids: Sequence[int] | None = None,
        convention: str | None = None,
    ) -> tuple[int, ...]:
        """Entering-layer ids. num_layers: of the target, when it is known; an EAGLE folder that names no layers is
        then read as SafeAILab's code does, which knows one choice. layer_ids, convention: win over the file."""
        if self.eagle1:
            return (FINAL,)
        written, meant = written_layers(self.format, self.raw)
        numbers = written if layer_ids is None else list(layer_ids)
        if numbers is None:
            if self.format.name == "eagle" and num_layers is not None and convention is None:
                return default_feature_layers(num_layers)
            raise absent(self.path, self.format.name)
        if layer_ids is not None and convention is None:
            raise EagleError(f"say with --convention what --layer_ids mean: {', '.join(SHIFT)}")
        whole = isinstance(numbers, (list, tuple)) and all(type(i) is int for i in numbers)
        if not whole or len(numbers) != 3 or (convention or meant) not in SHIFT:
            raise EagleError(
                f"{self.path}: feature layers {numbers!r} ({convention or meant}) must be three ids, their convention "
                f"one of {', '.join(SHIFT)}"
            )
        return entering_ids(numbers, convention or meant)

    def parse(
        self, layers: tuple[int, ...], embedding: torch.Tensor | None = None
    ) -> tuple[HeadConfig, dict[str, torch.Tensor]]:
        """-> config, and exactly the tensors of that head's state_dict. embedding [V, H]: the target's; the same
        one in the folder is left out."""
        tensors, raw = dict(self.tensors), self.raw
        own, nested = tensors.get(EMBEDDING), raw.get("transformer_layer_config") or {}
        tied = raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
        if tied and own is not None and not self.eagle1:
            tensors.setdefault("lm_head.weight", own.clone())
        if own is not None and embedding is not None and own.shape == embedding.shape:
            theirs = embedding.detach()
            same = torch.equal(own.to(theirs.device, theirs.dtype), theirs)
            if same and (self.eagle1 or not raw.get("own_embedding")):
                del tensors[EMBEDDING]
                raw = raw | {"own_embedding": False}
        config = read_config(self.path, self.format, raw, tensors, layers)
        with torch.device("meta"):
            expected = make_head(config).state_dict()
        return config, to_ours(self.path, config, expected, tensors, self.format)


def read_folder(path: Path, format: str | None = None) -> Published:
    """format: eagle, sglang, vllm or modelopt; None detects it."""
    raw, tensors = read_json(path / "config.json"), read_weights(path)
    provenance = read_json(path / "eagle.json") if (path / "eagle.json").exists() else {}
    fmt = detect(path, raw, tensors.keys()) if format is None else table(format)
    return Published(path, raw, tensors, fmt, provenance)


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


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder; pickled ones as plain weights alone."""
    if (path / "model.safetensors").exists():
        try:
            return load_file(path / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise EagleError(
                f"{path / 'model.safetensors'} is damaged ({error}); restore the file"
            ) from error
    binary = path / "pytorch_model.bin"
    if binary.exists():
        try:
            tensors = torch.load(binary, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and runtime errors alike: not a file of weights
            reason = str(error).split(".")[0]
            raise EagleError(f"{binary} holds no plain weights ({reason})") from error
        plain = isinstance(tensors, dict) and all(torch.is_tensor(v) for v in tensors.values())
        if not plain:
            raise EagleError(f"{binary} holds no dict of tensors; give the head's state_dict")
        return dict(tensors)
    raise EagleError(
        f"{path} has neither model.safetensors nor pytorch_model.bin; it is not a head folder"
    )
