"""Draft heads: EAGLE-1 (Li et al. 2024, arXiv:2401.15077; EAGLE-2, arXiv:2406.16858, drafts with
the same weights and a dynamic tree) and EAGLE-3 (Li et al. 2025, arXiv:2503.01840), in published
tensor layouts.

Names of tensors, and whose they are:
- `fc, midlayer.*, norm, lm_head, d2t, t2d, embed_tokens`: SafeAILab/EAGLE's for EAGLE-3, and
  SpecForge's;
- `layers.N.*` of an EAGLE-3 head with several layers: vLLM's and speculators' (SafeAILab has one;
  SGLang says `midlayer` and `additional_layers.N-1`, whose `hidden_norm` is our `input_layernorm`);
- `input_norm` (norm_before_fc), `fc_norm.0 … fc_norm.2` (fc_norm): vLLM's and speculators';
- `self_attn.q_norm, k_norm` (qk_norm): Qwen3's in transformers, as speculators' qwen3 heads have
  them;
- `fc, layers.N.*, embed_tokens` of EAGLE-1: SafeAILab's; layer 0 has no `input_layernorm`.

B rows, T tokens, C of them kept, H hidden, D draft vocabulary, V target vocabulary, hd head_dim, F
feature width."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from ..errors import EagleError
from .head_config import FINAL as FINAL
from .head_config import OPTIONS as OPTIONS
from .head_config import HeadConfig
from .head_config import default_feature_layers as default_feature_layers
from .head_config import mlp_width as mlp_width

# layer, q [B, heads, T or C, hd], k and v [B, kv_heads, T, hd] -> [B, T or C, heads, hd]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal(layer, q, k, v) -> torch.Tensor:
    """The `Attend` of a whole text at once."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def rotary_embedding(c: HeadConfig, device: torch.device) -> LlamaRotaryEmbedding:
    """transformers' rotary embedding of a head, scaled as `rope_scaling` says."""
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    if rope["rope_type"] == "mrope":  # text alone: all sections count the same positions
        rope["rope_type"] = "default"
    with torch.device(device):
        one = {"num_attention_heads": 1, "hidden_size": c.head_dim, "head_dim": c.head_dim}
        limit = c.max_position_embeddings
        config = LlamaConfig(**one, max_position_embeddings=limit, rope_parameters=rope)
        return LlamaRotaryEmbedding(config).to(device)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, as transformers has them: x [B, heads, T, hd]; cos, sin [B, T, hd]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Queries, keys and values from an input of `width`; who attends to what is the caller's."""

    def __init__(self, c: HeadConfig, width: int) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        bias = c.attention_bias or c.qkv_bias
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        layer: int,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, T, width] -> [B, T, H]; of the tokens `keep` [C] alone, if given, [B, C, H]."""
        at = slice(None) if keep is None else keep
        q = turn(self.q_norm(self._split(self.q_proj(x[:, at]))), cos[:, at], sin[:, at])
        k = turn(self.k_norm(self._split(self.k_proj(x))), cos, sin)
        v = self._split(self.v_proj(x))
        return self.o_proj(attend(layer, q, k, v).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * hd] -> [B, heads, T, hd]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.act = ACT2FN[c.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One Llama layer. EAGLE-3's first reads [norm(embedding), norm(hidden)] of width 2H, EAGLE-1's
    first reads the hidden state un-normed."""

    def __init__(self, c: HeadConfig, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.wide = index == 0 and c.method == "eagle3"
        self.norm_before_residual = c.norm_before_residual
        self.self_attn = Attention(c, c.hidden_size * (2 if self.wide else 1))
        self.mlp = MLP(c)
        if self.wide:
            self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if self.wide or index > 0:
            self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, embeds, hidden, cos, sin, attend: Attend, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden [B, T, H]; embeds [B, T, H], read by EAGLE-3's first layer alone -> [B, T, H], of
        the tokens `keep` [C] alone, if given, [B, C, H]."""
        x = hidden
        if self.wide:
            normed = self.hidden_norm(hidden)
            x = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
            hidden = normed if self.norm_before_residual else hidden
        elif self.index > 0:
            x = self.input_layernorm(hidden)
        if keep is not None:
            hidden = hidden[:, keep]
        hidden = hidden + self.self_attn(x, cos, sin, attend, self.index, keep)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftHead(nn.Module):
    """What all heads share: decoder layers over a hidden state and the embedding of the token that
    follows.

    state_dict() has exactly the published keys of its kind. Without an embedding of its own, the
    head is given the target's."""

    has_output = True  # whether `logits` is the head's own, or the target's LM head
    config: HeadConfig

    def _finish(self) -> None:
        """The parts that stand last in every head, and the draft vocabulary."""
        c = self.config
        if c.own_embedding:
            self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.reduced_vocab:
            t2d = torch.arange(c.vocab_size) < c.draft_vocab_size
            self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", t2d)
        self._rotary: LlamaRotaryEmbedding | None = None
        try:
            rotary_embedding(c, torch.device("cpu"))
        # transformers checks little, and fails wherever a value takes it
        except Exception as error:
            raise EagleError(
                f"transformers cannot scale rotary positions by {c.rope_scaling} "
                f"({type(error).__name__}: {error}); correct rope_scaling in the head's config"
            ) from error

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """First to last."""
        return list(self.layers) if hasattr(self, "layers") else [self.midlayer]

    @torch.no_grad()
    def set_draft_vocab(self, token_ids: torch.Tensor) -> None:
        """token_ids [D] distinct target ids: d2t holds the offset to add, t2d the membership."""
        c = self.config
        if not c.reduced_vocab:
            return
        given, token_ids = token_ids.numel(), token_ids.to(torch.int64).unique()
        if not given == len(token_ids) == c.draft_vocab_size:
            raise EagleError(
                f"the draft vocabulary needs {c.draft_vocab_size} distinct tokens, not "
                f"{len(token_ids)} among {given}"
            )
        self.d2t.copy_(token_ids - torch.arange(c.draft_vocab_size))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def draft_token_ids(self) -> torch.Tensor:
        """[D] target id of each draft id."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
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
            # outside of the module tree: it holds nothing that a checkpoint should have
            object.__setattr__(self, "_rotary", rotary_embedding(self.config, positions.device))
        return self._rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [B, T, F] -> [B, T, H], what `forward` takes for positions that the
        target has seen."""
        return features

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of `forward` [..., H] -> what the output layer reads."""
        return hidden

    def forward(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden [B, T, H] (`fuse` of target features, or this head's own output), embeds [B, T, H]
        of the tokens that follow, positions [B, T] -> hidden [B, T, H], the next pass's input.

        keep [C]: keys and values of all T tokens, and the output of these alone, [B, C, H]."""
        cos, sin = self.rotary(positions, hidden.dtype)
        *lower, last = self.decoder_layers
        for layer in lower:
            hidden = layer(embeds, hidden, cos, sin, attend)
        return last(embeds, hidden, cos, sin, attend, keep)


class Eagle3Head(DraftHead):
    """Three hidden states of the target, fused by `fc`; the output before the last norm is fed
    back."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.norm_before_fc:
            self.input_norm = RMSNorm(c.feature_size, c.rms_norm_eps)
        if c.fc_norm:
            norms = [RMSNorm(c.target_hidden_size, c.rms_norm_eps) for _ in c.feature_layers]
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(c.feature_size, c.hidden_size, bias=c.fc_bias)
        if c.num_layers == 1:
            self.midlayer = DecoderLayer(c)
        else:
            self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size, bias=False)
        self._finish()

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            each = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([n(x) for n, x in zip(self.fc_norm, each, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, hidden, embeds, positions, attend, keep=None) -> torch.Tensor:
        hidden = super().forward(hidden, embeds, positions, attend, keep)
        return self.norm(hidden) if self.config.norm_output else hidden

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.config.norm_output else self.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of `forward` [..., H] -> [..., D] over the draft vocabulary."""
        return self.lm_head(self.last_norm(hidden))


class Eagle1Head(DraftHead):
    """The target's final hidden state, predicted one token ahead; logits are the target's LM head's
    of it."""

    has_output = False

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = c = config
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=c.fc_bias)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_layers))
        self._finish()

    def forward(self, hidden, embeds, positions, attend, keep=None) -> torch.Tensor:
        # in the embeddings' dtype also where autocast has `fc` in another: it is the residual
        # stream
        hidden = self.fc(torch.cat([embeds, hidden], dim=-1)).to(embeds.dtype)
        return super().forward(hidden, embeds, positions, attend, keep)


def make_head(config: HeadConfig) -> DraftHead:
    """A head of the config's method, with torch's initial weights."""
    return {"eagle3": Eagle3Head, "eagle1": Eagle1Head}[config.method](config)


def build(config: HeadConfig, state: dict[str, torch.Tensor]) -> DraftHead:
    """state: exactly the head's keys; its dtypes are kept."""
    with torch.device("meta"):
        head = make_head(config)
    head.load_state_dict(state, strict=True, assign=True)
    return head
