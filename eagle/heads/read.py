"""A head's folder in any format -> its HeadConfig and tensors under our names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, create_model

from ..errors import EagleError
from ..files import read_json, read_tensors, require_numbers
from .configs import SHIFT, detect, entering_ids, is_eagle1, read_config, written_layers
from .head import make_head
from .head_config import FINAL, HeadConfig, default_feature_layers
from .tables import EMBEDDING, Format, table, to_ours


def part(name: str, base: type[BaseModel] | None = None, /, **fields) -> type[BaseModel]:
    """A JSON object in which these fields may stand, of these types; it may hold more."""
    config = None if base else ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    fields = {field: (kind | None, None) for field, kind in fields.items()}
    return create_model(name, __config__=config, __base__=base, **fields)


# of a Llama config; the fields of `HeadConfig` are checked there
ROPE = {"rope_theta": float, "rope_scaling": dict, "rope_parameters": dict}
NAMED = {"model_type": str, "architectures": list[str], "layer_types": list[str]}
Decoder = part("Decoder", tie_word_embeddings=bool, **NAMED, **ROPE)
# config.json of any format
ConfigFile = part(
    "ConfigFile",
    Decoder,
    speculators_model_type=str,
    speculators_config=part("Speculators", verifier=part("Verifier", name_or_path=str)),
    transformer_layer_config=Decoder,
    eagle_config=dict,
    eagle_aux_hidden_state_convention=str,
)
# a target, as a record names it; eagle.json of a head or an adapter: what it belongs to
Owner = part("Owner", id=str, fingerprint=str, adapter=str, quantization=str)
RecordFile = part(
    "RecordFile",
    Owner,
    target=Owner,
    base=Owner,
    tokenizer=str,
    training=dict,
    data=part("Data", files=list[str]),
)


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
        """Entering-layer ids. num_layers: of the target, when it is known; an EAGLE folder that
        names no layers is then read as SafeAILab's code does, which knows one choice. layer_ids,
        convention: win over the file."""
        if self.eagle1:
            return (FINAL,)
        written, meant = written_layers(self.format, self.raw)
        numbers = written if layer_ids is None else list(layer_ids)
        if numbers is None:
            if self.format.name == "eagle" and num_layers is not None and convention is None:
                return default_feature_layers(num_layers)
            raise EagleError(
                f"{self.path} ({self.format.name}) names no feature layers. Give --layer_ids i,j,k "
                "with --convention, or find out with --probe --target PATH, which measures "
                "acceptance under each. entering: i is the state that enters layer i (EAGLE, vLLM, "
                "speculators: 2, L//2, L-3); output: the output of layer i (SGLang, SpecForge, "
                "ModelOpt: 1, L//2-1, L-4); one-based: as entering, with layers counted from 1"
            )
        if layer_ids is not None and convention is None:
            raise EagleError(f"say with --convention what --layer_ids mean: {', '.join(SHIFT)}")
        whole = isinstance(numbers, (list, tuple)) and all(type(i) is int for i in numbers)
        if not whole or len(numbers) != 3 or (convention or meant) not in SHIFT:
            raise EagleError(
                f"{self.path}: feature layers {numbers!r} ({convention or meant}) must be three "
                f"ids, their convention one of {', '.join(SHIFT)}"
            )
        return entering_ids(numbers, convention or meant)

    def parse(
        self, layers: tuple[int, ...], embedding: torch.Tensor | None = None
    ) -> tuple[HeadConfig, dict[str, torch.Tensor]]:
        """-> config, and exactly the tensors of that head's state_dict. embedding [V, H]: the
        target's; the same one in the folder is left out."""
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
        try:
            with torch.device("meta"):
                expected = make_head(config).state_dict()
        except EagleError as error:
            raise EagleError(f"{self.path}: {error}") from error
        return config, to_ours(self.path, config, expected, tensors, self.format)


def read_folder(path: Path, format: str | None = None) -> Published:
    """format: eagle, sglang, vllm or modelopt; None detects it."""
    raw, tensors = read_json(path / "config.json", ConfigFile), read_weights(path)
    require_numbers(tensors, path)
    record = path / "eagle.json"
    provenance = read_json(record, RecordFile) if record.exists() else {}
    fmt = detect(path, raw, tensors.keys()) if format is None else table(format)
    return Published(path, raw, tensors, fmt, provenance)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder; pickled ones as plain weights alone."""
    if (path / "model.safetensors").exists():
        return read_tensors(path / "model.safetensors")
    binary = path / "pytorch_model.bin"
    if binary.exists():
        try:
            tensors = dict(torch.load(binary, map_location="cpu", weights_only=True))
        except Exception as error:  # pickle, zip and runtime errors alike: not a file of weights
            reason = str(error).split(".")[0]
            raise EagleError(f"{binary} holds no plain weights ({reason})") from error
        if not all(torch.is_tensor(v) for v in tensors.values()):
            raise EagleError(f"{binary} holds no dict of tensors; give the head's state_dict")
        return tensors
    raise EagleError(f"{path} has neither model.safetensors nor pytorch_model.bin; give a head")
