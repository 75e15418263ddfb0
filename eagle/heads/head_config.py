"""What a draft head is like: sizes, options, and which of the target's states it reads."""

from __future__ import annotations

import functools
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Literal, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model
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

EAGLE3_ONLY = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class HeadConfig:
    """The flat Llama fields of a published config.json, which target states are the features, and
    in what published heads differ.

    feature_layers: of EAGLE-3 three entering-layer ids (hidden_states[i] of transformers is what
      enters layer i); of EAGLE-1 (FINAL,).
    norm_before_residual: the first layer's residual is the normed hidden state. norm_before_fc,
      fc_norm: an RMSNorm over the concatenated features, over each of them. norm_output: the next
      draft step is fed the output after the last norm. attention_bias: of q, k, v and o; qkv_bias:
      of q, k and v alone. own_embedding: [V, H], in place of the target's. qk_norm: RMSNorm of
      queries and keys over head_dim."""

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

    def __post_init__(self) -> None:
        if self.fc_bias is None:
            object.__setattr__(self, "fc_bias", self.method == "eagle1")
        require_typed(HeadConfig, vars(self))
        if self.head_dim % 2:
            raise EagleError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise EagleError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly; choose a divisor"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise EagleError(
                f"draft_vocab_size {self.draft_vocab_size} must lie in 1 … {self.vocab_size} (the "
                "target's)"
            )
        if self.hidden_act not in ACT2FN:
            raise EagleError(f"transformers knows no activation {self.hidden_act!r}; use silu")
        if self.method == "eagle1":
            self._require_eagle1()
        elif len(self.feature_layers) != 3 or min(self.feature_layers) < 0:
            raise EagleError(
                f"an EAGLE-3 head reads three layers, not {list(self.feature_layers)}; give three "
                "ids"
            )
        if self.target_hidden_size != self.hidden_size and not self.own_embedding:
            raise EagleError(
                f"a head of hidden size {self.hidden_size} cannot read the embedding of a target "
                f"of {self.target_hidden_size}; set own_embedding, or use the target's size"
            )

    def _require_eagle1(self) -> None:
        """What EAGLE-1 has no place for: its output goes through the target's LM head."""
        given = [name for name in EAGLE3_ONLY if getattr(self, name)]
        if given:
            raise EagleError(f"EAGLE-1 heads have no {', '.join(given)}; use method=eagle3")
        if self.feature_layers != (FINAL,):
            raise EagleError(
                f"an EAGLE-1 head reads the target's final hidden state, ({FINAL},), not layers "
                f"{list(self.feature_layers)}; leave feature_layers out"
            )
        if self.reduced_vocab or self.target_hidden_size != self.hidden_size:
            raise EagleError(
                "an EAGLE-1 head has the target's hidden size and vocabulary: its output goes "
                "through the target's LM head; use method=eagle3 for a smaller one"
            )

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
        values = {**asdict(self), "feature_layers": list(self.feature_layers)}
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        defaults["fc_bias"] = self.method == "eagle1"
        return {k: v for k, v in values.items() if k not in OPTIONS or v != defaults[k]}

    @classmethod
    def names(cls) -> set[str]:
        return {f.name for f in fields(cls)}


@functools.cache
def _typed(cls: type) -> type:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(cls, include_extras=True)
    return create_model(cls.__name__, __config__=strict, **{k: (v, ...) for k, v in hints.items()})


def require_typed(cls: type, values: dict) -> None:
    """Refuse values that the annotations of a dataclass do not allow: they may come from files of
    others."""
    try:
        _typed(cls).model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise EagleError(
            f"a head's {first['loc'][0]} cannot be {str(values[first['loc'][0]])[:60]}: "
            f"{first['msg'].lower()}"
        ) from error


NAMES = [f.name for f in fields(HeadConfig)]

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
