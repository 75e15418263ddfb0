"""What a run is made of before its first step: target, data, draft vocabulary, head."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configs.schema import HeadTrainConfig
from eagle.checkpoint import load_head
from eagle.errors import EagleError
from eagle.head import Eagle3Head, HeadConfig
from eagle.target import Target
from train.data import TokenizedData, load_dataset_for, load_tokenizer
from train.data.card import who_answered
from train.data.tokens import tokenizer_hash
from train.head import guards
from train.head.evaluate import Prompt, heldout_prompts
from train.head.features import Belongs, FeatureStore
from train.head.vocab import choose_draft_vocab, coverage, describe, special_ids


@dataclass
class Parts:
    """states: what gives features and final hidden states of rows, the target or what it wrote before.
    identity: what a resumed run must have in common. notes: what is to be known before the first step."""

    target: Target
    states: Target | FeatureStore
    head: Eagle3Head
    data: TokenizedData
    prompts: list[Prompt]
    vocabulary: dict
    provenance: dict
    identity: dict
    pad_id: int = 0
    notes: list[str] = field(default_factory=list)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(
    cfg: HeadTrainConfig, output: Path | None, device: torch.device,
    draft_ids: torch.Tensor | None = None,
) -> Parts:  # fmt: skip
    """Load what `cfg` names. `output`: where rejected rows are listed (None: nowhere). `draft_ids` [D]: the
    draft vocabulary of the run that is resumed (None: chosen by the data, or the warm start's)."""
    tokenizer = load_tokenizer(cfg.model.base)
    data = load_dataset_for(cfg.data, tokenizer, split="train", out_dir=output)
    guards.require_supervised(data.stats["supervised_tokens"], cfg.data.min_supervised_tokens)
    m = cfg.model
    target = Target.from_pretrained(
        m.base, dtype=m.dtype, device=device, adapter_path=m.adapter, quantization=m.quantization
    )
    held_out = (
        load_dataset_for(cfg.data, tokenizer, split="eval", out_dir=output)
        if cfg.eval.num_prompts
        else None
    )
    room = target.max_positions - cfg.eval.max_new_tokens
    if room < 1:
        raise EagleError(
            f"eval.max_new_tokens={cfg.eval.max_new_tokens} leaves no room for a prompt; lower it"
        )
    prompts = heldout_prompts(held_out, cfg.eval.num_prompts, room) if held_out else []
    if cfg.data.max_length > target.max_positions:
        raise EagleError(
            f"data.max_length={cfg.data.max_length} exceeds the {target.max_positions} positions of "
            f"{target.name}; lower it"
        )
    counts = data.token_counts(target.vocab_size)
    always = special_ids(tokenizer, target.vocab_size)
    seed_everything(cfg.train.seed)
    head = _warm(cfg, target) if cfg.model.init_head else _fresh(cfg, target, counts, always)
    if draft_ids is not None:
        head.set_draft_vocab(draft_ids)
    ids = head.draft_token_ids().cpu().numpy()
    sources = {s.name: s.token_counts(target.vocab_size) for s in data.sources}
    vocabulary = coverage(counts, ids, always, sources)
    target.set_feature_layers(head.config.feature_layers)
    who = target.identity
    states: Target | FeatureStore = target
    if cfg.data.features:
        states = FeatureStore(cfg.data.features)
        states.require_fit(Belongs.to(target), data, cfg.data)
    provenance = {
        "target": who,
        "tokenizer": tokenizer_hash(tokenizer),
        "data": {"format": cfg.data.format, "files": [p.name for p in data.paths], **data.stats,
                 "answers": who_answered(data.paths, cfg.data.on_policy, who["fingerprint"], who["adapter"])},
        "draft_vocabulary": vocabulary,
    }  # fmt: skip
    provenance["data"].pop("cache_hit", None)
    identity = {
        "target": [who["fingerprint"], who["adapter"], who["quantization"]],
        "head": head.config.to_dict(),
        "data": [
            cfg.data.format,
            data.stats["rows"],
            data.stats["tokens"],
            data.stats["supervised_tokens"],
            data.digest,
        ],
        "data.seed": cfg.data.seed,
        "train.seed": cfg.train.seed,
        "train.optimizer": cfg.train.optimizer,
    }
    pad = tokenizer.pad_token_id
    pad_id = pad if pad is not None and 0 <= pad < target.vocab_size else 0
    notes = [describe(vocabulary), attention_note(target)]
    return Parts(
        target, states, head, data, prompts, vocabulary, provenance, identity, pad_id, notes
    )


def attention_note(target: Target) -> str:
    """Which attention a step computes with, and what becomes of flash-attention."""
    head = "the head's in blocks of its own"
    if target.device.type != "cuda":
        return f"attention: the target's by torch SDPA, {head}; flash-attention needs a CUDA GPU"
    config = target.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q = torch.empty(1, 1, 8, size, device=target.device, dtype=target.dtype)
    asked = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, True, False)
    kernel = "flash" if torch.backends.cuda.can_use_flash_attention(asked) else "memory-efficient"
    found = importlib.util.find_spec("flash_attn") is not None
    package = f"flash-attn {importlib.metadata.version('flash_attn')}" if found else "no flash-attn"
    return (
        f"attention: the target's by torch SDPA with its {kernel} kernel ({target.dtype}, head size {size}), "
        f"{head}; {package} installed, and not needed"
    )


def _fresh(
    cfg: HeadTrainConfig, target: Target, counts: np.ndarray, always: list[int]
) -> Eagle3Head:
    V, m = target.vocab_size, cfg.model
    size = m.draft_vocab_size or min(32000, max(V // 2, 1))
    if size > V:
        raise EagleError(
            f"model.draft_vocab_size={size} exceeds the target's vocabulary of {V}; lower it"
        )
    if size < len(always):
        raise EagleError(
            f"model.draft_vocab_size={size} cannot hold the {len(always)} special tokens; raise it"
        )
    config = HeadConfig.for_target(
        target.config, vocab_size=V, draft_vocab_size=size, intermediate_size=m.intermediate_size,
        feature_layers=m.feature_layers or target.feature_layers,
        num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads,
    )  # fmt: skip
    head = Eagle3Head(config)
    for name, p in head.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data.mul_(0.1)  # the residual path carries the features through at first
    ids, _ = choose_draft_vocab(counts, always, size)
    head.set_draft_vocab(ids)
    rows = target.model.get_output_embeddings().weight
    if rows.is_floating_point():  # the target's own rows know what each token looks like
        scale = rows.detach()[ids.to(rows.device)].float().cpu()
        head.lm_head.weight.data.copy_(
            scale / scale.std().clamp_min(1e-6) * config.hidden_size**-0.5
        )
    return head


def _warm(cfg: HeadTrainConfig, target: Target) -> Eagle3Head:
    """The head to start from; its draft vocabulary stays, whatever the data holds."""
    head, _ = load_head(cfg.model.init_head, target, dtype="float32")
    m, c = cfg.model, head.config
    pairs = [("draft_vocab_size", m.draft_vocab_size, c.draft_vocab_size),
             ("feature_layers", m.feature_layers, c.feature_layers),
             ("intermediate_size", m.intermediate_size, c.intermediate_size),
             ("num_heads", m.num_heads, c.num_attention_heads),
             ("num_kv_heads", m.num_kv_heads, c.num_key_value_heads)]  # fmt: skip
    for name, asked, has in pairs:
        if asked is not None and tuple(np.atleast_1d(asked)) != tuple(np.atleast_1d(has)):
            raise EagleError(
                f"model.{name}={asked} contradicts the head to start from, which has {has}; leave it out"
            )
    return head.requires_grad_(True)
