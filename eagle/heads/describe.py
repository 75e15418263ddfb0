"""What a head's folder says of itself: format, geometry, layer ids, draft vocabulary, and what it
belongs to."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import EagleError
from ..files import weights_hash
from .configs import written_layers
from .head_config import OPTIONS, SHAPE
from .read import Published
from .tables import EMBEDDING


def describe(published: Published) -> dict:
    """JSON-ready; raises EagleError for a folder that cannot be loaded, except for absent layer
    ids."""
    layers = feature_layers(published)
    # any three ids make the same tensors
    known = layers["entering"] is not None
    config, state = published.parse(tuple(layers["entering"]) if known else (0, 1, 2))
    record = published.provenance
    target = record.get("target") or {}
    speculators = published.raw.get("speculators_config") or {}
    floats = {str(v.dtype).split(".")[-1] for v in state.values() if v.is_floating_point()}
    values = config.to_dict()
    return {
        "path": str(published.path),
        "format": published.format.name,
        "method": config.method,
        "fingerprint": weights_hash(state),
        "parameters": sum(v.numel() for v in state.values() if v.is_floating_point()),
        "dtypes": sorted(floats),
        "geometry": {name: values[name] for name in SHAPE},
        "options": {name: values[name] for name in OPTIONS if name in values and name != "method"},
        "feature_layers": layers,
        "draft_vocabulary": _vocabulary(config, state),
        "belongs_to": {
            "target": record.get("target"),
            "adapter": record.get("adapter") or target.get("adapter"),
            "quantization": record.get("quantization") or target.get("quantization"),
            "tokenizer": record.get("tokenizer"),
            "verifier": (speculators.get("verifier") or {}).get("name_or_path"),
        },
        "training": record.get("training"),
    }


def feature_layers(published: Published) -> dict:
    """{"entering": ids or None, "written": as the file has them, "convention"}"""
    if published.eagle1:
        return {"entering": [-1], "written": None, "convention": "final hidden state"}
    written, convention = written_layers(published.format, published.raw)
    entering = None if written is None else list(published.layers())
    return {"entering": entering, "written": written, "convention": convention}


def _vocabulary(config, state: dict[str, torch.Tensor]) -> dict:
    vocabulary = {"size": config.draft_vocab_size, "of": config.vocab_size, "own_embedding": False}
    vocabulary["own_embedding"] = EMBEDDING in state
    if config.reduced_vocab:
        ids = state["d2t"] + torch.arange(config.draft_vocab_size)
        vocabulary |= {"fingerprint": weights_hash({"ids": ids}), "last_token": int(ids.max())}
    return vocabulary


def lines(said: dict) -> list[str]:
    """The same for people."""
    g, layers, belongs = said["geometry"], said["feature_layers"], said["belongs_to"]
    target, vocabulary = belongs["target"] or {}, said["draft_vocabulary"]
    ids = "absent; measure them with: eagle convert HEAD --probe --target PATH"
    if said["method"] == "eagle1":
        ids = "the target's final hidden state"
    elif layers["written"] is not None:
        ids = f"{layers['written']} ({layers['convention']}), "
        ids += f"states that enter layers {layers['entering']}"
    options = ", ".join(f"{k}={v}" for k, v in said["options"].items()) or "none"
    reduced = vocabulary["size"] != vocabulary["of"]
    maps = f"reduced ({vocabulary['fingerprint'][:12]})" if reduced else "the target's own"
    training = said["training"] or {}
    heads = f"{g['num_attention_heads']} heads, {g['num_key_value_heads']} key/value heads"
    rows = [
        ("head", said["path"]),
        ("format", f"{said['format']}, {said['method']}"),
        ("fingerprint", said["fingerprint"]),
        ("parameters", f"{said['parameters']:,} in {', '.join(said['dtypes'])}"),
        (
            "geometry",
            f"hidden {g['hidden_size']}, MLP {g['intermediate_size']}, {heads} of {g['head_dim']}",
        ),
        ("rotary", f"theta {g['rope_theta']:g}, scaling {g['rope_scaling']}"),
        ("options", options),
        ("layer ids", ids),
        ("vocabulary", f"{vocabulary['size']} of {vocabulary['of']}, {maps}"),
        ("embedding", "its own" if vocabulary["own_embedding"] else "the target's"),
        (
            "target",
            f"{target.get('id') or belongs['verifier'] or 'not recorded'}, hidden "
            f"{g['target_hidden_size']}",
        ),
        ("weights", target.get("fingerprint") or "not recorded"),
        ("adapter", belongs["adapter"] or "none recorded"),
        ("quantization", belongs["quantization"] or "none recorded"),
        ("tokenizer", belongs["tokenizer"] or "not recorded"),
    ]
    if training:
        rows.append(("training", ", ".join(f"{k}={v}" for k, v in training.items())))
    return [f"{name:<13} {value}" for name, value in rows]


def require_bench_of(bench: dict, provenance: dict) -> list[dict]:
    """The speculative runs of a bench JSON; refused where they are of another target, or were
    forced to accept."""
    runs = bench.get("runs")
    if not isinstance(runs, list) or not all(isinstance(r, dict) for r in runs):
        raise EagleError("the bench file has no runs; give what inference.bench --json wrote")
    target = (provenance.get("target") or {}).get("id")
    if target is not None and bench.get("model") != target:
        raise EagleError(
            f"the bench file is of target {bench.get('model')!r}, the head belongs to {target!r}; "
            "measure this head"
        )
    drafted = [r for r in runs if str(r.get("engine", "")).startswith("eagle") and r.get("tau")]
    if not drafted:
        raise EagleError("the bench file has no run of an eagle engine; use --engines hf,eagle")
    if any(r.get("forced_acceptance") is not None for r in drafted):
        raise EagleError("the bench file has forced acceptance; measure without")
    return drafted


def bench_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise EagleError(f"no bench file {path}; write one with inference.bench --json {path}")
    return path
