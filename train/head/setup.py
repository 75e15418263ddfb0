"""What a run is made of before its first step: target, data, draft vocabulary, head."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configs.schema import HeadTrainConfig, ModelConfig
from eagle.checkpoint import load_head
from eagle.errors import EagleError
from eagle.heads.head import OPTIONS, DraftHead, HeadConfig, make_head
from eagle.loading import resolve_compute
from eagle.meter import Bar
from eagle.target import Target
from records import TokenizedData, load_dataset_for, load_tokenizer
from records.card import who_answered
from records.tokens import tokenizer_hash
from train.head import guards
from train.head.evaluate import Prompt, heldout_prompts
from train.head.features import Belongs, FeatureStore
from train.head.vocab import choose_draft_vocab, coverage, describe, special_ids


@dataclass
class Parts:
    """states: what gives features and final hidden states of rows, the target or what it wrote
    before.
    embed: ids [...] -> embeddings [..., H], the target's or the head's own, which is not trained.
      identity:
    what a resumed run must have in common. notes: what is to be known before the first step."""

    target: Target
    states: Target | FeatureStore
    head: DraftHead
    embed: torch.nn.Module
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


def settle(
    cfg: HeadTrainConfig, device: torch.device, before: dict | None = None
) -> HeadTrainConfig:
    """`cfg` with the dtypes that the run is to have. before: the config of the run that is resumed,
    which keeps its
    own: what "auto" meant where it began, another machine may read otherwise."""
    kept = {}
    for name in ("model", "train") if before else ():
        asked, had = getattr(cfg, name).dtype, before[name]["dtype"]
        if "auto" not in (asked, had) and asked != had:
            raise EagleError(
                f"the run to resume has {name}.dtype={had}, not {asked}; leave {name}.dtype out, or start a new run "
                "with another --output"
            )
        kept[name] = had if asked == "auto" else asked
    dtypes = {"model": cfg.model.dtype, "train": cfg.train.dtype, **kept}
    return with_dtypes(cfg, dtypes["model"], resolve_compute(dtypes["train"], device))


def with_dtypes(cfg: HeadTrainConfig, target: str, head: str) -> HeadTrainConfig:
    model = cfg.model.model_copy(update={"dtype": target})
    train = cfg.train.model_copy(update={"dtype": head})
    return cfg.model_copy(update={"model": model, "train": train})


def build(
    cfg: HeadTrainConfig,
    output: Path | None,
    device: torch.device,
    draft_ids: torch.Tensor | None = None,
) -> Parts:
    """Load what `cfg` names. `output`: where rejected rows are listed (None: nowhere). `draft_ids`
    [D]: the draft vocabulary of the run that is resumed (None: chosen by the data, or the warm
    start's)."""
    tokenizer = load_tokenizer(cfg.model.base)
    data = load_dataset_for(cfg.data, tokenizer, split="train", out_dir=output)
    guards.require_supervised(data.stats["supervised_tokens"], cfg.data.min_supervised_tokens)
    m = cfg.model
    with Bar(quiet=output is None) as bar:
        bar.doing("loading the target")
        target = Target.from_pretrained(
            m.base,
            dtype=m.dtype,
            device=device,
            adapter_path=m.adapter,
            quantization=m.quantization,
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
        "data": {
            "format": cfg.data.format,
            "files": [p.name for p in data.paths],
            **data.stats,
            "answers": who_answered(
                data.paths, cfg.data.on_policy, who["fingerprint"], who["adapter"]
            ),
        },
        "draft_vocabulary": vocabulary,
    }
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
    embed = target.embed
    if head.config.own_embedding:
        head.embed_tokens.requires_grad_(False)
        embed = copy.deepcopy(head.embed_tokens).to(device)  # ZeRO may split the head's weights
    return Parts(
        target, states, head, embed, data, prompts, vocabulary, provenance, identity, pad_id, notes
    )


def output_rows(target: Target) -> torch.Tensor:
    """The target's LM head as one matrix [V, H], which EAGLE-1 heads learn to draft through."""
    layer = target.model.get_output_embeddings()
    plain = layer.weight.is_floating_point() and getattr(layer, "bias", None) is None
    if not plain or target.head_logits.cap:
        raise EagleError(
            f"the LM head of {target.name} is not one plain matrix (it is quantized, has a bias or caps its "
            "logits), which model.method=eagle1 needs; train an eagle3 head"
        )
    rows = layer.weight.detach()
    return rows if target.head_logits.scale == 1.0 else rows * target.head_logits.scale


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


def fresh_config(
    m: ModelConfig, config, vocab_size: int, feature_layers: tuple[int, ...] | None = None
) -> HeadConfig:
    """Of the head that `m` asks for, over a target of text config `config`."""
    size = m.draft_vocab_size or min(32000, max(vocab_size // 2, 1))
    if size > vocab_size:
        raise EagleError(
            f"model.draft_vocab_size={size} exceeds the target's vocabulary of {vocab_size}; lower it"
        )
    if m.method == "eagle1":
        size, feature_layers = vocab_size, None
    return HeadConfig.for_target(
        config,
        vocab_size=vocab_size,
        draft_vocab_size=size,
        intermediate_size=m.intermediate_size,
        feature_layers=m.feature_layers or feature_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        **_options(m),
    )


def _options(m: ModelConfig) -> dict:
    """What `m` says of a head's options."""
    return {name: value for name in OPTIONS if (value := getattr(m, name, None)) is not None}


def _fresh(
    cfg: HeadTrainConfig, target: Target, counts: np.ndarray, always: list[int]
) -> DraftHead:
    config = fresh_config(cfg.model, target.config, target.vocab_size, target.feature_layers)
    size = config.draft_vocab_size
    if size < len(always):
        raise EagleError(
            f"model.draft_vocab_size={size} cannot hold the {len(always)} special tokens; raise it"
        )
    head = make_head(config)
    for name, p in head.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data.mul_(0.1)  # the residual path carries the features through at first
        elif name.endswith("bias"):
            p.data.zero_()
    ids, _ = choose_draft_vocab(counts, always, size)
    head.set_draft_vocab(ids)
    rows = target.model.get_output_embeddings().weight
    if head.has_output and rows.is_floating_point():
        # the target's own rows know what each token looks like
        scale = rows.detach()[ids.to(rows.device)].float().cpu()
        head.lm_head.weight.data.copy_(
            scale / scale.std().clamp_min(1e-6) * config.hidden_size**-0.5
        )
    return head


def _warm(cfg: HeadTrainConfig, target: Target) -> DraftHead:
    """The head to start from; its draft vocabulary stays, whatever the data holds."""
    head, _ = load_head(cfg.model.init_head, target, dtype="float32")
    m, c = cfg.model, head.config
    pairs = [
        ("draft_vocab_size", m.draft_vocab_size, c.draft_vocab_size),
        ("feature_layers", m.feature_layers, c.feature_layers),
        ("intermediate_size", m.intermediate_size, c.intermediate_size),
        ("num_heads", m.num_heads, c.num_attention_heads),
        ("num_kv_heads", m.num_kv_heads, c.num_key_value_heads),
        *((name, asked, getattr(c, name)) for name, asked in _options(m).items()),
    ]
    for name, asked, has in pairs:
        if asked is not None and tuple(np.atleast_1d(asked)) != tuple(np.atleast_1d(has)):
            raise EagleError(
                f"model.{name}={asked} contradicts the head to start from, which has {has}; set that, or leave it out"
            )
    return head.requires_grad_(True)
