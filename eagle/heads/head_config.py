"""What a draft head is like: sizes, options, and which of the target's states it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.activations import ACT2FN

from ..errors import EagleError

FINAL = -1  # as a feature layer: the target's last hidden state, after its final norm

# what a field may be: no head comes near the bounds, and a damaged file allocates nothing
Size = Annotated[int, Field(gt=0, le=2**20)]
Few = Annotated[int, Field(gt=0, le=2**12)]
Layers = Annotated[int, Field(gt=0, le=2**6)]
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Positions = Annotated[int, Field(gt=0, le=2**31)]
Layer = Annotated[int, Field(ge=FINAL, le=2**12)]
Positive = Annotated[float, Field(gt=0)]
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


class HeadConfig(BaseModel):
    """The flat Llama fields of a published config.json, which target states are the features, and
    in what published heads differ.

    feature_layers: of EAGLE-3 three entering-layer ids (hidden_states[i] of transformers is what
      enters layer i); of EAGLE-1 (FINAL,).
    norm_before_residual: the first layer's residual is the normed hidden state. norm_before_fc,
      fc_norm: an RMSNorm over the concatenated features, over each of them. norm_output: the next
      draft step is fed the output after the last norm. attention_bias: of q, k, v and o; qkv_bias:
      of q, k and v alone. own_embedding: [V, H], in place of the target's. qk_norm: RMSNorm of
      queries and keys over head_dim."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="forbid")

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Few
    num_key_value_heads: Few
    head_dim: Few
    vocab_size: Vocabulary
    draft_vocab_size: Vocabulary
    target_hidden_size: Size
    feature_layers: tuple[Layer, ...]
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: Positions = 2048
    hidden_act: str = "silu"
    method: Literal["eagle3", "eagle1"] = "eagle3"
    num_layers: Layers = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool | None = None  # None: as published, EAGLE-1's has one
    own_embedding: bool = False
    qk_norm: bool = False

    def __init__(self, **values) -> None:
        """Refuses, as an EagleError, what no head is: values may come from files of others."""
        if values.get("fc_bias") is None:
            values["fc_bias"] = values.get("method") == "eagle1"
        rope = values.get("rope_scaling")
        if isinstance(rope, dict):  # "type" is the older name
            kind = rope.get("rope_type") or rope.get("type") or "default"
            rope = {k: v for k, v in rope.items() if k != "type"} | {"rope_type": kind}
            values["rope_scaling"] = None if kind == "default" else rope
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = first["loc"][0]
            raise EagleError(
                f"a head's {name} cannot be {str(values.get(name))[:60]}: {first['msg'].lower()}"
            ) from error
        for wrong, said in self._contradictions():
            if wrong:
                raise EagleError(said)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        yield self.head_dim % 2 != 0, f"head_dim {self.head_dim} must be even: rotary turns pairs"
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        said = f"{heads} attention heads cannot share {shared} key/value heads evenly"
        yield heads % shared != 0, f"{said}; choose a divisor"
        said = f"draft_vocab_size {self.draft_vocab_size} must lie in 1 … {self.vocab_size}"
        yield self.draft_vocab_size > self.vocab_size, f"{said} (the target's)"
        said = f"transformers knows no activation {self.hidden_act!r}; use silu"
        yield self.hidden_act not in ACT2FN, said
        layers, resized = self.feature_layers, self.target_hidden_size != self.hidden_size
        if self.method == "eagle1":
            given = [name for name in NORMS if getattr(self, name)]
            said = f"EAGLE-1 heads have no {', '.join(given)}; use method=eagle3"
            yield given != [], said
            said = f"an EAGLE-1 head reads the target's final hidden state, not layers {layers}"
            yield layers != (FINAL,), f"{said}; leave feature_layers out"
            said = "an EAGLE-1 head has the target's hidden size and vocabulary: its output goes"
            said += " through the target's LM head; use method=eagle3 for a smaller one"
            yield self.reduced_vocab or resized, said
        else:
            said = f"an EAGLE-3 head reads three layers, not {list(layers)}; give three ids"
            yield len(layers) != 3 or min(layers) < 0, said
        said = f"a head of hidden size {self.hidden_size} cannot read the embedding of a target of "
        said += f"{self.target_hidden_size}; set own_embedding, or use the target's size"
        yield resized and not self.own_embedding, said

    @property
    def reduced_vocab(self) -> bool:
        return self.draft_vocab_size != self.vocab_size

    @property
    def feature_size(self) -> int:
        """F: the width of what the target gives at a position."""
        return len(self.feature_layers) * self.target_hidden_size

    @classmethod
    def for_target(cls, config, **overrides) -> HeadConfig:
        """A head that fits a target's text config: same hidden size and rotary base, one layer."""
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        if rope and all(isinstance(v, dict) for v in rope.values()):  # one entry an attention type
            rope = rope.get("full_attention", next(iter(rope.values())))
        overrides = {k: v for k, v in overrides.items() if v is not None}
        if "feature_layers" not in overrides:
            last = overrides.get("method") == "eagle1"
            layers = (FINAL,) if last else default_feature_layers(config.num_hidden_layers)
            overrides["feature_layers"] = layers
        values = {
            "hidden_size": config.hidden_size,
            "intermediate_size": mlp_width(config),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": config.vocab_size,
            "target_hidden_size": config.hidden_size,
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0),
            "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 2048,
        }
        values.update(overrides)
        if "num_attention_heads" in overrides and "num_key_value_heads" not in overrides:
            values["num_key_value_heads"] = values["num_attention_heads"]
        return cls(**values)

    def to_dict(self) -> dict:
        """As JSON holds it; options are named where they are not the default."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        defaults["fc_bias"] = self.method == "eagle1"
        values = self.model_dump(mode="json")
        return {k: v for k, v in values.items() if k not in OPTIONS or v != defaults[k]}


NAMES = list(HeadConfig.model_fields)
OPTIONS = NAMES[NAMES.index("method") :]  # in what published heads differ
SHAPE = [name for name in NAMES if name not in ("feature_layers", *OPTIONS)]


def mlp_width(config) -> int:
    """The width of the MLP under the names that families give it; GPT-2's default is four times the
    hidden."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return getattr(config, name)
    return 4 * config.hidden_size


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Entering-layer ids 2, L//2, L-3; on shallow models the nearest three distinct ids that
    exist."""
    wanted = sorted({min(max(i, 0), num_layers) for i in (2, num_layers // 2, num_layers - 3)})
    spare = [i for i in range(num_layers, -1, -1) if i not in wanted]
    while len(wanted) < 3 and spare:
        wanted = sorted([*wanted, spare.pop(0)])
    if len(wanted) < 3:
        raise EagleError(f"EAGLE-3 needs three feature layers; {num_layers} layers are too few")
    return tuple(wanted)
