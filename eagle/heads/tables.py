"""What each format calls the tensors, which of a head's options it has a place for, and which maps
it holds.

Sources, read in 2026-11: SafeAILab/EAGLE `eagle/model/cnets.py` (EAGLE-3) and `cnets1.py`
(EAGLE-1/2); SGLang `srt/models/llama_eagle3.py`; vLLM `models/llama_eagle3.py` and
`transformers_utils/configs/speculators/algos.py`; speculators 0.9.0 `models/eagle3`; ModelOpt
`torch/export/plugins/hf_spec_export.py` (LLAMA_EAGLE_SINGLE_LAYER) and `hf_spec_configs.py`.

D draft vocabulary, V target vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import EagleError
from .head_config import OPTIONS, HeadConfig

EMBEDDING = "embed_tokens.weight"
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAPS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)


@dataclass(frozen=True)
class Format:
    """options: those of HeadConfig that its engine runs. layer: its prefix of an only layer. maps:
    d2t and t2d where the vocabulary is reduced ("reduced"), always ("always"), or d2t alone
    ("d2t")."""

    name: str
    engine: str
    convention: str
    options: frozenset[str]
    layer: str = "midlayer."
    maps: str = "reduced"

    def theirs(self, key: str) -> str:
        ours = "midlayer."
        return self.layer + key.removeprefix(ours) if key.startswith(ours) else key


EAGLE = frozenset({"method", "num_layers", "qkv_bias", "fc_bias", "own_embedding"})
SGLANG = frozenset({"fc_bias", "own_embedding"})
VLLM = frozenset(OPTIONS) - {"method", "fc_bias", "qkv_bias"}
MODELOPT = frozenset({"num_layers", "attention_bias", "mlp_bias"})
FORMATS = (
    Format("eagle", "SafeAILab/EAGLE", "entering", EAGLE),
    Format("sglang", "SGLang", "output", SGLANG, maps="always"),
    Format("vllm", "vLLM", "entering", VLLM, "layers.0."),
    Format("modelopt", "ModelOpt", "output", MODELOPT, "layers.0.", maps="d2t"),
)
TABLE = {f.name: f for f in FORMATS}


def table(name: str) -> Format:
    if name not in TABLE:
        raise EagleError(f"unknown format {name!r}; use {', '.join(TABLE)}")
    return TABLE[name]


def require_expressible(config: HeadConfig, fmt: Format) -> None:
    """Refuse a head that the format's engine would read as another one."""
    wrong = _without_place(config, fmt)
    if wrong:
        others = [f.name for f in TABLE.values() if not _without_place(config, f)]
        remedy = f"use --to {' or '.join(others)}" if others else "no published format has it"
        if "own_embedding" in wrong:
            remedy += ", or give --target: an embedding that equals the target's is left out"
        raise EagleError(f"{fmt.engine} has no place for this head's {', '.join(wrong)}; {remedy}")


def _without_place(config: HeadConfig, fmt: Format) -> list[str]:
    options = fmt.options
    if fmt.name == "eagle" and config.method == "eagle3":
        options = options - {"num_layers", "qkv_bias", "fc_bias"}  # EAGLE-1's alone
    given = config.to_dict()  # options that are at their default are not in it
    wrong = [o for o in OPTIONS if o in given and o not in options]
    same_hidden = config.target_hidden_size == config.hidden_size
    if fmt.name == "sglang" and config.own_embedding and same_hidden:
        # SGLang puts the target's in its place where the sizes allow
        wrong.append("own_embedding")
    if fmt.name == "modelopt" and not same_hidden:
        wrong.append("target_hidden_size")
    if fmt.name == "vllm" and config.qk_norm and config.mlp_bias:
        wrong.append("mlp_bias together with qk_norm")  # Qwen3's MLP has none
    if fmt.name == "eagle" and config.method == "eagle3" and config.rope_scaling:
        kind = config.rope_scaling["rope_type"]
        # cnets.py knows these two, and scales a base of 10000 whatever rope_theta says
        if kind not in ("linear", "dynamic") or config.rope_theta != 10000.0:
            wrong.append(f"rope_scaling {kind} with rope_theta {config.rope_theta:g}")
    return wrong


def to_theirs(config: HeadConfig, state: dict, fmt: Format) -> dict[str, torch.Tensor]:
    """Our state_dict -> the format's tensors."""
    out = {fmt.theirs(k): v for k, v in state.items()}
    if fmt.maps == "always" and not config.reduced_vocab:
        out["d2t"] = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        out["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
    if fmt.maps == "d2t":
        out.pop("t2d", None)
    return out


def to_ours(
    path: object, config: HeadConfig, expected: dict, published: dict, fmt: Format
) -> dict[str, torch.Tensor]:
    """The format's tensors -> exactly the keys and shapes of `expected`, our head's state_dict; an
    EagleError names everything that is missing, left over or of another shape."""
    state, names = dict(published), {k: fmt.theirs(k) for k in expected}
    reduced = config.reduced_vocab
    if not reduced and _identity(config, state):
        state.pop("d2t", None)
        state.pop("t2d", None)
    if reduced and fmt.maps == "d2t" and "t2d" not in state and "d2t" in state:
        state["t2d"] = membership(path, config, state["d2t"])
    wrong = {
        "missing": [n for n in names.values() if n not in state],
        "left over": state.keys() - set(names.values()),
        "of another shape than config.json gives": [
            f"{n} {list(state[n].shape)} instead of {list(expected[k].shape)}"
            for k, n in names.items()
            if n in state and state[n].shape != expected[k].shape
        ],
        "of a dtype that no head has (the file is damaged or quantized)": [
            f"{n} {str(state[n].dtype).removeprefix('torch.')}"
            for k, n in names.items()
            if n in state and state[n].dtype not in (MAPS if k in ("d2t", "t2d") else WEIGHTS)
        ],
    }
    said = "; ".join(
        f"{what}: {', '.join(sorted(those))}" for what, those in wrong.items() if those
    )
    if said:
        kind = config.method.upper().replace("EAGLE", "EAGLE-")
        raise EagleError(f"{path} is not an {kind} head in the {fmt.name} format; {said}")
    out = {k: state[n] for k, n in names.items()}
    if reduced:
        out["d2t"], out["t2d"] = out["d2t"].to(torch.int64), out["t2d"].bool()
        if not torch.equal(membership(path, config, out["d2t"]), out["t2d"]):
            raise EagleError(f"{path}: d2t and t2d contradict each other; the file is damaged")
    return out


def _identity(config: HeadConfig, state: dict) -> bool:
    """Do the maps, where there are any, leave every token at its place? Then nothing is lost
    without them."""
    d2t, t2d = state.get("d2t"), state.get("t2d")
    full = (config.vocab_size,)
    return (d2t is None or d2t.shape == full and not d2t.any()) and (
        t2d is None or t2d.shape == full and bool(t2d.bool().all())
    )


def membership(path: object, config: HeadConfig, d2t: torch.Tensor) -> torch.Tensor:
    """d2t [D] of offsets -> t2d [V], which target tokens have a draft id."""
    D, V = config.draft_vocab_size, config.vocab_size
    ids = d2t.flatten().to(torch.int64) + torch.arange(d2t.numel())
    if d2t.shape != (D,) or ids.min() < 0 or ids.max() >= V or ids.unique().numel() != D:
        raise EagleError(
            f"{path}: d2t does not give {D} distinct tokens of {V}; d2t holds offsets (target id "
            "= draft id + d2t), the file is damaged or holds target ids"
        )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return t2d
