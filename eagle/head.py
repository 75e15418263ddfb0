"""The EAGLE-3 draft head (Li et al. 2025, arXiv:2503.01840), in the published tensor layout.

Knows hidden states, embeddings and draft-vocabulary ids; knows nothing of caches, trees or training.

B rows, T tokens, H hidden, D draft vocabulary, V target vocabulary, hd head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from .errors import EagleError

# q [B, heads, T, hd], k and v [B, kv_heads, T, hd] -> [B, T, heads, hd]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadConfig:
    """The flat Llama fields of a published config.json, and which target states are the features.

    feature_layers are entering-layer ids: hidden_states[i] of transformers is what enters layer i.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    feature_layers: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise EagleError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value "
                "heads evenly; choose a divisor"
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise EagleError(
                f"draft_vocab_size {self.draft_vocab_size} must lie in 1 … {self.vocab_size} (the target's)"
            )

    @property
    def reduced_vocab(self) -> bool:
        return self.draft_vocab_size != self.vocab_size

    @classmethod
    def for_target(cls, config, **overrides) -> HeadConfig:
        """A head that fits a target's text config: same hidden size and rotary base, one layer."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        if rope and all(isinstance(v, dict) for v in rope.values()):  # one entry an attention type
            rope = rope.get("full_attention", next(iter(rope.values())))
        values = {
            "hidden_size": config.hidden_size,
            "intermediate_size": mlp_width(config),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": config.vocab_size,
            "target_hidden_size": config.hidden_size,
            "feature_layers": default_feature_layers(layers),
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0),
            "max_position_embeddings": getattr(config, "max_position_embeddings", 2048),
        }
        values.update({k: v for k, v in overrides.items() if v is not None})
        if overrides.get("num_attention_heads") and not overrides.get("num_key_value_heads"):
            values["num_key_value_heads"] = values["num_attention_heads"]
        return cls(**values)

    def to_dict(self) -> dict:
        return {**asdict(self), "feature_layers": list(self.feature_layers)}

    @classmethod
    def names(cls) -> set[str]:
        return {f.name for f in fields(cls)}


def mlp_width(config) -> int:
    """The width of the MLP under the names that families give it; GPT-2's default is four times the hidden."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return getattr(config, name)
    return 4 * config.hidden_size


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Entering-layer ids 2, L//2, L-3; on shallow models the nearest three distinct ids that exist."""
    wanted = sorted({min(max(i, 0), num_layers) for i in (2, num_layers // 2, num_layers - 3)})
    spare = [i for i in range(num_layers, -1, -1) if i not in wanted]
    while len(wanted) < 3 and spare:
        wanted = sorted([*wanted, spare.pop(0)])
    if len(wanted) < 3:
        raise EagleError(
            f"EAGLE-3 needs three feature layers; a model of {num_layers} layers has too few"
        )
    return tuple(wanted)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Queries, keys and values from [embedding, hidden] of width 2H; who attends to what is the caller's."""

    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return self.o_proj(attend(q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.act = ACT2FN[c.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One Llama layer whose attention reads [norm(embedding), norm(hidden)]; the residual is the hidden."""

    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, embeds, hidden, cos, sin, attend: Attend) -> torch.Tensor:
        x = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(x, cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """state_dict() has exactly the published keys. The embedding is the target's and not a part of it."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = DecoderLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.reduced_vocab:
            t2d = torch.arange(config.vocab_size) < config.draft_vocab_size
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", t2d)
        self._rotary: LlamaRotaryEmbedding | None = None

    @torch.no_grad()
    def set_draft_vocab(self, token_ids: torch.Tensor) -> None:
        """token_ids [D] sorted, distinct target ids: d2t holds the offset to add, t2d the membership."""
        c = self.config
        if not c.reduced_vocab:
            return
        token_ids = token_ids.to(torch.int64).sort().values
        if (
            token_ids.numel() != c.draft_vocab_size
            or token_ids.unique().numel() != token_ids.numel()
        ):
            raise EagleError(
                f"the draft vocabulary needs {c.draft_vocab_size} distinct tokens, not "
                f"{token_ids.unique().numel()} among {token_ids.numel()}"
            )
        self.d2t.copy_(token_ids - torch.arange(c.draft_vocab_size))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def draft_token_ids(self) -> torch.Tensor:
        """[D] target id of each draft id."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.lm_head.weight.device)
        return self.to_target(ids)

    def to_target(self, draft_ids: torch.Tensor) -> torch.Tensor:
        if not self.config.reduced_vocab:
            return draft_ids
        return draft_ids + self.d2t[draft_ids]

    def rotary(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, T] -> cos, sin [B, T, hd]."""
        if self._rotary is None or self._rotary.inv_freq.device != positions.device:
            c = self.config
            rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
            llama = LlamaConfig(
                hidden_size=c.head_dim, num_attention_heads=1, head_dim=c.head_dim,
                max_position_embeddings=c.max_position_embeddings, rope_parameters=rope,
            )  # fmt: skip
            # outside of the module tree: it holds nothing that a checkpoint should have
            object.__setattr__(self, "_rotary", LlamaRotaryEmbedding(llama).to(positions.device))
        return self._rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)

    def forward(
        self, hidden: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """hidden [B, T, H] (fc of target features, or this head's own output), embeds [B, T, H] of the
        tokens that follow, positions [B, T] -> pre-norm hidden [B, T, H], the next pass's input."""
        cos, sin = self.rotary(positions, hidden.dtype)
        return self.midlayer(embeds, hidden, cos, sin, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """pre-norm hidden [..., H] -> [..., D] over the draft vocabulary."""
        return self.lm_head(self.norm(hidden))
