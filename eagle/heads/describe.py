"""What a head's folder says of itself: format, geometry, layer ids, draft vocabulary, and what it
belongs to."""

from __future__ import annotations

import torch

from ..files import weights_hash
from .configs import written_layers
from .head_config import FINAL, OPTIONS, SHAPE
from .read import Published
from .tables import EMBEDDING


def describe(published: Published) -> dict:
    """JSON-ready; raises EagleError for a folder that cannot be loaded, except for absent layer
    ids: those are None, entering and written."""
    written, convention = None, "final hidden state"
    entering: list[int] | None = [FINAL]
    if not published.eagle1:
        written, convention = written_layers(published.format, published.raw)
        entering = None if written is None else list(published.layers())
    # any three ids make the same tensors
    config, state = published.parse((0, 1, 2) if entering is None else tuple(entering))
    record, values = published.provenance, config.to_dict()
    target = record.get("target") or {}
    verifier = (published.raw.get("speculators_config") or {}).get("verifier") or {}
    weights = [v for v in state.values() if v.is_floating_point()]
    vocabulary = {"size": config.draft_vocab_size, "of": config.vocab_size}
    vocabulary["own_embedding"] = EMBEDDING in state
    if config.reduced_vocab:
        ids = state["d2t"] + torch.arange(config.draft_vocab_size)
        vocabulary |= {"fingerprint": weights_hash({"ids": ids}), "last_token": int(ids.max())}
    belongs = {k: record.get(k) or target.get(k) for k in ("adapter", "quantization")}
    return {
        "path": str(published.path),
        "format": published.format.name,
        "method": config.method,
        "fingerprint": weights_hash(state),
        "parameters": sum(v.numel() for v in weights),
        "dtypes": sorted({str(v.dtype).split(".")[-1] for v in weights}),
        "geometry": {name: values[name] for name in SHAPE},
        "options": {name: values[name] for name in OPTIONS if name in values and name != "method"},
        "feature_layers": {"entering": entering, "written": written, "convention": convention},
        "draft_vocabulary": vocabulary,
        "belongs_to": {
            "target": record.get("target"),
            **belongs,
            "tokenizer": record.get("tokenizer"),
            "verifier": verifier.get("name_or_path"),
        },
        "training": record.get("training"),
    }


def facts(said: dict) -> dict[str, str]:
    """The same for people: what is said, under its name."""
    g, layers, belongs = said["geometry"], said["feature_layers"], said["belongs_to"]
    target, vocabulary = belongs["target"] or {}, said["draft_vocabulary"]
    ids = f"{layers['written']} ({layers['convention']}), "
    ids += f"states that enter layers {layers['entering']}"
    if said["method"] == "eagle1":
        ids = "the target's final hidden state"
    elif layers["written"] is None:
        ids = "absent; measure them with: eagle convert HEAD --probe --target PATH"
    maps = vocabulary.get("fingerprint")
    maps = f"reduced ({maps[:12]})" if maps else "the target's own"
    heads = f"{g['num_attention_heads']} heads, {g['num_key_value_heads']} key/value heads"
    named = target.get("id") or belongs["verifier"] or "not recorded"

    def listed(values: dict | None) -> str:
        return ", ".join(f"{k}={v}" for k, v in (values or {}).items())

    return {
        "head": said["path"],
        "format": f"{said['format']}, {said['method']}",
        "fingerprint": said["fingerprint"],
        "parameters": f"{said['parameters']:,} in {', '.join(said['dtypes'])}",
        "geometry": f"hidden {g['hidden_size']}, MLP {g['intermediate_size']}, {heads} of "
        f"{g['head_dim']}",
        "rotary": f"theta {g['rope_theta']:g}, scaling {g['rope_scaling']}",
        "options": listed(said["options"]) or "none",
        "layer ids": ids,
        "vocabulary": f"{vocabulary['size']} of {vocabulary['of']}, {maps}",
        "embedding": "its own" if vocabulary["own_embedding"] else "the target's",
        "target": f"{named}, hidden {g['target_hidden_size']}",
        "weights": target.get("fingerprint") or "not recorded",
        "adapter": belongs["adapter"] or "none recorded",
        "quantization": belongs["quantization"] or "none recorded",
        "tokenizer": belongs["tokenizer"] or "not recorded",
        "training": listed(said["training"]) or "not recorded",
    }
