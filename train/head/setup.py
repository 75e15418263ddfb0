"""What a run is made of before its first step: target, data, draft vocabulary, head."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configs.schema import HeadTrainConfig
from eagle.checkpoint import load_head, target_fingerprint
from eagle.errors import EagleError
from eagle.head import Eagle3Head, HeadConfig
from eagle.target import Target
from train.data import load_dataset_for, load_tokenizer
from train.data.tokens import tokenizer_hash
from train.head.evaluate import heldout_prompts
from train.head.vocab import choose_draft_vocab, coverage, special_ids


@dataclass
class Parts:
    target: Target
    head: Eagle3Head
    data: object
    prompts: list[list[int]]
    vocabulary: dict
    provenance: dict
    identity: dict
    pad_id: int = 0
    notes: list[str] = field(default_factory=list)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(cfg: HeadTrainConfig, output: Path | None, device: torch.device) -> Parts:
    """Load what `cfg` names. `output`: where rejected rows are listed (None: nowhere)."""
    tokenizer = load_tokenizer(cfg.model.base)
    data = load_dataset_for(cfg.data, tokenizer, split="train", out_dir=output)
    target = Target.from_pretrained(cfg.model.base, dtype=cfg.model.dtype, device=device)
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
    seed_everything(cfg.train.seed)
    if cfg.model.init_head:
        head, vocabulary = _warm(cfg, target, counts)
    else:
        head, vocabulary = _fresh(cfg, target, counts, special_ids(tokenizer, target.vocab_size))
    target.set_feature_layers(head.config.feature_layers)
    fingerprint = target_fingerprint(target.model)
    quantization = getattr(target.model.config, "quantization_config", None)
    provenance = {
        "target": {"id": target.name, "fingerprint": fingerprint, "dtype": str(target.dtype).split(".")[-1]},
        "tokenizer": tokenizer_hash(tokenizer),
        "adapter": None,
        "quantization": str(quantization) if quantization else None,
        "data": {"format": cfg.data.format, "files": [p.name for p in data.paths], **data.stats,
                 "answers": "written by the target" if cfg.data.on_policy else "as in the data"},
        "draft_vocabulary": vocabulary,
    }  # fmt: skip
    provenance["data"].pop("cache_hit", None)
    identity = {
        "target": fingerprint,
        "head": head.config.to_dict(),
        "data": [
            cfg.data.format,
            data.stats["rows"],
            data.stats["tokens"],
            data.stats["supervised_tokens"],
        ],
        "train.seed": cfg.train.seed,
        "train.optimizer": cfg.train.optimizer,
    }
    pad = tokenizer.pad_token_id
    pad_id = pad if pad is not None and 0 <= pad < target.vocab_size else 0
    return Parts(target, head, data, prompts, vocabulary, provenance, identity, pad_id)


def _fresh(
    cfg: HeadTrainConfig, target: Target, counts: np.ndarray, always: list[int]
) -> tuple[Eagle3Head, dict]:
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
    ids, report = choose_draft_vocab(counts, always, size)
    head.set_draft_vocab(ids)
    rows = target.model.get_output_embeddings().weight
    if rows.is_floating_point():  # the target's own rows know what each token looks like
        scale = rows.detach()[ids.to(rows.device)].float().cpu()
        head.lm_head.weight.data.copy_(
            scale / scale.std().clamp_min(1e-6) * config.hidden_size**-0.5
        )
    return head, report


def _warm(cfg: HeadTrainConfig, target: Target, counts: np.ndarray) -> tuple[Eagle3Head, dict]:
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
    return head.requires_grad_(True), coverage(counts, head.draft_token_ids().cpu().numpy())
