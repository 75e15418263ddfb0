"""config.json of each format <-> HeadConfig.

Where an absent field means different things to different engines (norm_before_residual: vLLM takes
true for a speculators config, false for a flat one; speculators 0.9.0 false), the default is that
of the engine whose format it is, and what is written names every field.

Layer ids: here a feature layer is an entering-layer id, `hidden_states[i]` of transformers enters
layer i (i = 0: the embedding). What projects write:

- SafeAILab's code takes `hidden_states[2], [L // 2], [L - 3]` and its configs name no layers; vLLM
  (`aux_hidden_state_layers`, a state taken before layer i runs) and speculators
  (`eagle_aux_hidden_state_layer_ids` beside it) count the same way: "entering";
- SGLang, SpecForge and ModelOpt write `[1, L // 2 - 1, L - 4]` under `eagle_config` for the same
  states: outputs of layer i (SGLang's `set_eagle3_layers_to_capture` adds one): "output";
- the numbers of one kind copied into a config of the other are off by one, either way. "one-based"
  is the mistake that "output" does not cover: the numbers are one too high.

L layers of the target."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ..errors import EagleError
from .head_config import FINAL, NORMS, SHAPE, HeadConfig
from .tables import EMBEDDING, Format, table

IDS, IDS_CONVENTION = "eagle_aux_hidden_state_layer_ids", "eagle_aux_hidden_state_convention"
SHIFT = {"entering": 0, "output": 1, "one-based": -1}  # entering id = number + shift
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FLAT_VLLM = {"Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM"}
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
    if "speculators_model_type" in raw or "speculators_config" in raw:
        kind = raw.get("speculators_model_type", "eagle3")
        if kind != "eagle3":
            raise EagleError(f"{path} is a speculator of type {kind!r}; EAGLE-3 heads can be read")
        return table("vllm")
    if FLAT_VLLM & {*(raw.get("architectures") or [])}:
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


def entering_ids(numbers: Sequence[int], convention: str) -> tuple[int, ...]:
    """Numbers as written -> entering-layer ids."""
    return tuple(i + SHIFT[convention] for i in numbers)


def candidates(numbers: Sequence[int], num_layers: int) -> dict[str, tuple[int, ...]]:
    """The readings of `numbers` that a target of L layers has."""
    every = {convention: entering_ids(numbers, convention) for convention in SHIFT}
    return {c: ids for c, ids in every.items() if all(0 <= i <= num_layers for i in ids)}


def read_config(
    path: object, fmt: Format, raw: dict, state: dict[str, torch.Tensor], layers: tuple[int, ...]
) -> HeadConfig:
    """layers: entering-layer ids."""
    nested = raw.get("transformer_layer_config") if fmt.name == "vllm" else None
    llama = nested if isinstance(nested, dict) else raw
    values = _llama(path, llama)
    _fill(values, raw, draft_vocab_size=llama["vocab_size"], own_embedding=False)
    _fill(values, raw, target_hidden_size=llama["hidden_size"])
    _fill(values, raw, num_layers=_first(llama.get("num_hidden_layers"), 1))
    values["own_embedding"] = EMBEDDING in state or values["own_embedding"]
    if raw.get("quantization_config"):
        raise EagleError(f"{path}: quantized heads cannot be read; give the unquantized one")
    if "sliding_attention" in (llama.get("layer_types") or []):
        raise EagleError(f"{path}: a head with sliding-window attention cannot be read")
    if is_eagle1(raw, state.keys()):
        layers = (FINAL,)
        values |= {"method": "eagle1", "draft_vocab_size": llama["vocab_size"]}
    if fmt.name in ("eagle", "sglang"):
        _fill(values, raw, fc_bias=raw.get("bias"))
    if fmt.name == "vllm":
        _fill_vllm(path, values, raw, llama)
    if fmt.name == "modelopt":
        given = raw.get("eagle_config") or {}
        other = [f"{k}={given[k]}" for k, v in MODELOPT.items() if given.get(k, v) not in (v, None)]
        if other:
            raise EagleError(f"{path}: ModelOpt's {', '.join(other)} is another kind of head")
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


def _first(*found):
    """Of fields that may be absent or null, the first that says something."""
    return next((value for value in found if value is not None), None)


def _fill(values: dict, raw: dict, **defaults) -> None:
    """Fields of config.json itself, where they may be absent or null."""
    values |= {name: _first(raw.get(name), default) for name, default in defaults.items()}


def _llama(path: object, raw: dict) -> dict:
    """The flat fields of a Llama config, and the rotary ones under their old or new names."""
    wanted = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [k for k in wanted if raw.get(k) is None]
    if missing:
        raise EagleError(f"{path}: config.json lacks {', '.join(missing)}; it is no head's")
    names = HeadConfig.model_fields.keys() - {"feature_layers", "rope_scaling", "rope_theta"}
    values = {k: raw[k] for k in names & raw.keys() if raw[k] is not None}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    # transformers 5 keeps the true base here, where a class default may stand beside it
    values["rope_theta"] = _first(rope.pop("rope_theta", None), raw.get("rope_theta"), 10000.0)
    values["rope_scaling"] = rope
    values.setdefault("num_key_value_heads", raw["num_attention_heads"])
    sizes = raw["hidden_size"], raw["num_attention_heads"]
    if all(type(n) is int and n > 0 for n in sizes):
        values.setdefault("head_dim", sizes[0] // sizes[1])
    return {"head_dim": None, **values}


def _fill_vllm(path: object, values: dict, raw: dict, llama: dict) -> None:
    _fill(values, raw, **dict.fromkeys(NORMS, False))
    if llama is not raw and raw.get("norm_before_residual") is None:
        values["norm_before_residual"] = True
        warnings.warn(
            f"{path}: config.json does not say norm_before_residual; vLLM takes true, and so is it "
            "read (speculators 0.9 would take false)",
            stacklevel=2,
        )
    kind = llama.get("model_type", "llama")
    if kind not in ("llama", "qwen3"):
        raise EagleError(f"{path}: layers of type {kind!r} cannot be read; llama or qwen3 can")
    values["qk_norm"] = kind == "qwen3"


def own_config(config: HeadConfig, dtype: torch.dtype) -> dict:
    """The `eagle` format: flat fields, those of SafeAILab's configs among them, and every option
    that is set."""
    flat = config.to_dict()
    ids = {IDS: flat.pop("feature_layers"), IDS_CONVENTION: "entering"}
    if not config.own_embedding:
        # where it stands, cnets.py does not load the target's embedding and drafts with a random
        # one
        del flat["target_hidden_size"]
    architecture, last = "LlamaForCausalLMEagle3", ids
    if config.method == "eagle1":
        architecture, last = "LlamaForCausalLM", {}
        flat["bias"] = config.fc_bias  # upstream's name
    head = {"architectures": [architecture], "model_type": "llama"}
    head |= {"num_hidden_layers": config.num_layers}
    return {**head, **flat, **_flat(config, dtype), "dtype": DTYPES[dtype], **last}


def _flat(config: HeadConfig, dtype: torch.dtype) -> dict:
    """What every format says of the decoder layers."""
    names = [n for n in SHAPE if n not in ("draft_vocab_size", "target_hidden_size")]
    return {
        "num_hidden_layers": config.num_layers,
        **{name: getattr(config, name) for name in (*names, "attention_bias", "mlp_bias")},
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
    }


def write_config(fmt: Format, config: HeadConfig, dtype: torch.dtype, verifier: dict) -> dict:
    """verifier: {"name_or_path", "architectures"} of the target."""
    if fmt.name == "eagle":
        written = own_config(config, dtype)
        if config.method == "eagle3" and config.rope_scaling:
            # cnets.py reads the older name, and its config takes these two fields and no other
            kind, factor = config.rope_scaling["rope_type"], config.rope_scaling["factor"]
            written["rope_scaling"] = {"type": kind, "factor": float(factor)}
        return written
    ids = [i - SHIFT[fmt.convention] for i in config.feature_layers]
    if min(ids) < 0:
        said = f"the head reads the target's embedding (entering layer 0): {fmt.engine} has no id"
        raise EagleError(f"{said} for it; use --to vllm")
    draft = {"draft_vocab_size": config.draft_vocab_size}
    flat = {"model_type": "llama", **_flat(config, dtype)}
    if fmt.name == "modelopt":
        ours = {"eagle_config": {IDS: ids, **MODELOPT}}
    else:
        draft["target_hidden_size"] = config.target_hidden_size
        ours = {"eagle_config": {"use_aux_hidden_state": True, IDS: ids}}
    if fmt.name != "vllm":
        bias = {"bias": True} if config.fc_bias else {}
        return {"architectures": ["LlamaForCausalLMEagle3"], **flat, **draft, **bias, **ours}
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    greedy = {"proposal_type": "greedy", "speculative_tokens": 5}
    greedy |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        **draft,
        **{name: getattr(config, name) for name in NORMS},
        IDS: ids,
        "transformer_layer_config": {
            **flat,
            "model_type": "qwen3" if config.qk_norm else "llama",
            "rope_parameters": rope,
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": verifier,
        },
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
    }
