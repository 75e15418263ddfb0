"""config.json of each format <-> HeadConfig.

Where an absent field means different things to different engines (norm_before_residual: vLLM takes
true for a speculators config, false for a flat one; speculators 0.9.0 false), the default is that
of the engine whose format it is, and what is written names every field."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ..errors import EagleError
from .head_config import FINAL, SHAPE, HeadConfig
from .layers import written_ids
from .tables import EMBEDDING, Format, table

IDS, IDS_CONVENTION = "eagle_aux_hidden_state_layer_ids", "eagle_aux_hidden_state_convention"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
FLAT_VLLM = ("Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM")
SPECULATORS_VERSION = "0.9.0"  # whose fields these are
# of ModelOpt's eagle_config: other values are other heads
MODELOPT = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}


def detect(path: object, raw: dict, keys: set[str]) -> Format:
    """The format of a folder with this config.json and these tensor names."""
    architectures = raw.get("architectures") or []
    if "speculators_model_type" in raw or "speculators_config" in raw:
        kind = raw.get("speculators_model_type", "eagle3")
        if kind != "eagle3":
            raise EagleError(f"{path} is a speculator of type {kind!r}; EAGLE-3 heads can be read")
        return table("vllm")
    if any(a in FLAT_VLLM for a in architectures):
        return table("vllm")
    wide = "layers.0.hidden_norm.weight" in keys
    if isinstance(raw.get("eagle_config"), dict):
        return table("modelopt" if wide else "sglang")
    if wide and IDS_CONVENTION not in raw:
        raise EagleError(
            f"{path} names its tensors as vllm and modelopt do, and config.json says neither; give "
            "--from"
        )
    return table("eagle")


def written_layers(fmt: Format, raw: dict) -> tuple[list[int] | None, str]:
    """The ids as the config has them (None: it has none), and their convention."""
    if fmt.name in ("sglang", "modelopt"):
        return (raw.get("eagle_config") or {}).get(IDS), fmt.convention
    return raw.get(IDS), raw.get(IDS_CONVENTION, fmt.convention)


def read_config(
    path: object, fmt: Format, raw: dict, state: dict[str, torch.Tensor], layers: tuple[int, ...]
) -> HeadConfig:
    """layers: entering-layer ids."""
    nested = raw.get("transformer_layer_config") if fmt.name == "vllm" else None
    llama = nested if isinstance(nested, dict) else raw
    values = _llama(path, llama) | _published(fmt, raw, llama, state)
    if raw.get("quantization_config"):
        raise EagleError(f"{path}: quantized heads cannot be read; give the unquantized one")
    if "sliding_attention" in (llama.get("layer_types") or []):
        raise EagleError(f"{path}: a head with sliding-window attention cannot be read")
    if fmt.name == "vllm":
        values |= _vllm(path, raw, llama, nested is not None)
    if fmt.name == "modelopt":
        nested = raw.get("eagle_config") or {}
        other = [
            f"{k}={nested[k]}" for k, v in MODELOPT.items() if nested.get(k, v) not in (v, None)
        ]
        if other:
            raise EagleError(f"{path}: ModelOpt's {', '.join(other)} is another kind of head")
    if values.get("method") == "eagle1":
        layers = (FINAL,)
    try:
        return HeadConfig(**values, feature_layers=tuple(layers))
    except EagleError as error:
        raise EagleError(f"{path}: {error}") from error


def is_eagle1(raw: dict, keys: set[str]) -> bool:
    """EAGLE-1 has decoder layers and no norm of a hidden state; ours say so."""
    if "method" in raw:
        return raw["method"] == "eagle1"
    layers = any(k.startswith("layers.0.") for k in keys)
    return layers and not {"layers.0.hidden_norm.weight", "norm.weight", "lm_head.weight"} & keys


def _llama(path: object, raw: dict) -> dict:
    """The flat fields of a Llama config, and the rotary ones under their old or new names."""
    wanted = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [k for k in wanted if raw.get(k) is None]
    if missing:
        raise EagleError(f"{path}: config.json lacks {', '.join(missing)}; it is no head's")
    names = HeadConfig.names() - {"feature_layers", "rope_scaling", "rope_theta"}
    values = {k: raw[k] for k in names & raw.keys() if raw[k] is not None}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    # transformers 5 keeps the true base here, where a class default may stand beside it
    theta = rope.pop("rope_theta", None)
    theta = raw.get("rope_theta") if theta is None else theta
    kind = rope.pop("type", None)  # the older name
    kind = rope.pop("rope_type", None) or kind or "default"
    values["rope_theta"] = 10000.0 if theta is None else theta
    values["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" else None
    values.setdefault("num_key_value_heads", raw["num_attention_heads"])
    sizes = raw["hidden_size"], raw["num_attention_heads"]
    if "head_dim" not in values and all(type(n) is int and n > 0 for n in sizes):
        values["head_dim"] = sizes[0] // sizes[1]
    return {"head_dim": None, **values}


def _first(*found):
    """Of fields that may be absent or null, the first that says something."""
    return next((value for value in found if value is not None), None)


def _published(fmt: Format, raw: dict, llama: dict, state: dict[str, torch.Tensor]) -> dict:
    values = {}
    for key, default in (("draft_vocab_size", "vocab_size"), ("target_hidden_size", "hidden_size")):
        values[key] = llama[default] if raw.get(key) is None else raw[key]
    values["num_layers"] = _first(raw.get("num_layers"), llama.get("num_hidden_layers"), 1)
    values["own_embedding"] = EMBEDDING in state or _first(raw.get("own_embedding"), False)
    if is_eagle1(raw, state.keys()):
        values |= {"method": "eagle1", "draft_vocab_size": llama["vocab_size"]}
        values["fc_bias"] = _first(raw.get("fc_bias"), raw.get("bias"), True)
    elif fmt.name in ("eagle", "sglang"):
        values["fc_bias"] = _first(raw.get("fc_bias"), raw.get("bias"), False)
    return values


def _vllm(path: object, raw: dict, llama: dict, nested: bool) -> dict:
    values = {name: _first(raw.get(name), False) for name in NORMS}
    if nested and raw.get("norm_before_residual") is None:
        values["norm_before_residual"] = True
        warnings.warn(
            f"{path}: config.json does not say norm_before_residual; vLLM takes true, and so is it "
            "read (speculators 0.9 would take false)",
            stacklevel=2,
        )
    kind = llama.get("model_type", "llama")
    if kind not in ("llama", "qwen3"):
        raise EagleError(f"{path}: layers of type {kind!r} cannot be read; llama or qwen3 can")
    return values | {"qk_norm": kind == "qwen3"}


def _flat(config: HeadConfig, dtype: torch.dtype) -> dict:
    """What every format says of the decoder layers."""
    names = [n for n in SHAPE if n not in ("draft_vocab_size", "target_hidden_size")]
    return {
        "num_hidden_layers": config.num_layers,
        **{name: getattr(config, name) for name in (*names, "attention_bias", "mlp_bias")},
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
    }


def own_config(config: HeadConfig, dtype: torch.dtype) -> dict:
    """The `eagle` format: flat fields, those of SafeAILab's configs among them, and every option
    that is set."""
    eagle1 = config.method == "eagle1"
    flat = {k: v for k, v in config.to_dict().items() if k != "feature_layers"}
    if not config.own_embedding:
        # where it stands, cnets.py does not load the target's embedding and drafts with a random
        # one
        del flat["target_hidden_size"]
    ids = {} if eagle1 else {IDS: list(config.feature_layers), IDS_CONVENTION: "entering"}
    return {
        "architectures": ["LlamaForCausalLM" if eagle1 else "LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        **flat,
        **({"bias": config.fc_bias} if eagle1 else {}),  # upstream's name
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
        "dtype": DTYPES[dtype],
        **ids,
    }


def write_config(
    fmt: Format, config: HeadConfig, dtype: torch.dtype, verifier: dict, speculative_tokens: int = 5
) -> dict:
    """verifier: {"name_or_path", "architectures"} of the target."""
    if fmt.name == "eagle":
        written = own_config(config, dtype)
        if config.method == "eagle3" and config.rope_scaling:
            # cnets.py reads the older name, and its config takes these two fields and no other
            scaling = config.rope_scaling
            kind = scaling.get("rope_type") or scaling["type"]
            written["rope_scaling"] = {"type": kind, "factor": float(scaling["factor"])}
        return written
    ids = written_ids(config.feature_layers, fmt.convention, fmt.engine)
    draft = {"draft_vocab_size": config.draft_vocab_size}
    if fmt.name == "vllm":
        return draft | _speculators(config, dtype, ids, verifier, speculative_tokens)
    head = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    written = {**head, **_flat(config, dtype), **draft}
    if fmt.name == "modelopt":
        return {**written, "eagle_config": {IDS: ids, **MODELOPT}}
    bias = {"bias": True} if config.fc_bias else {}
    return {
        **written,
        **bias,
        "target_hidden_size": config.target_hidden_size,
        "eagle_config": {"use_aux_hidden_state": True, IDS: ids},
    }


def _speculators(
    config: HeadConfig, dtype: torch.dtype, ids: Sequence[int], verifier: dict, tokens: int
) -> dict:
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    layers = {"model_type": "qwen3" if config.qk_norm else "llama", **_flat(config, dtype)}
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "target_hidden_size": config.target_hidden_size,
        **{name: getattr(config, name) for name in NORMS},
        IDS: list(ids),
        "transformer_layer_config": {**layers, "rope_parameters": rope},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": verifier,
        },
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
    }
