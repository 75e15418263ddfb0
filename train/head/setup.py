"""What a run is made of before its first step: target, data, draft vocabulary, head.

V target vocabulary, D draft vocabulary: which target tokens the head can propose."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
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
from records.dataset import tell_shared
from records.tokens import tokenizer_hash
from train.head.evaluate import Prompt, heldout_prompts
from train.head.features import Belongs, FeatureStore
from train.runs import require_supervised

LITTLE = 0.8  # share of the supervised tokens


@dataclass
class Parts:
    """states: what gives features and final hidden states of rows, the target or what it wrote
    before. embed: ids [...] -> embeddings [..., H], the target's or the head's own, not trained.
    identity: what a resumed run must have in common. notes: to be told before the first step."""

    target: Target
    states: Target | FeatureStore
    head: DraftHead
    embed: torch.nn.Module
    data: TokenizedData
    prompts: list[Prompt]
    provenance: dict
    identity: dict
    pad_id: int
    notes: list[str]


def settle(cfg: HeadTrainConfig, device: torch.device, before: dict | None = None):
    """`cfg` with the dtypes that the run is to have. before: the config of the run that is resumed,
    which keeps what "auto" meant on its first machine."""
    dtypes = {}
    for name in ("model", "train"):
        asked = getattr(cfg, name).dtype
        had = before[name]["dtype"] if before else asked
        if "auto" not in (asked, had) and asked != had:
            raise EagleError(
                f"the run to resume has {name}.dtype={had}, not {asked}; leave {name}.dtype out"
            )
        dtypes[name] = had if asked == "auto" else asked
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
    """Load what `cfg` names. output: where rejected rows are listed (None: nowhere). draft_ids [D]:
    the draft vocabulary of the run that is resumed."""
    m, tokenizer = cfg.model, load_tokenizer(cfg.model.base)
    data = load_dataset_for(cfg.data, tokenizer, split="train", out_dir=output)
    require_supervised(data.stats["supervised_tokens"], cfg.data.min_supervised_tokens)
    with Bar(quiet=output is None) as bar:
        bar.doing("loading the target")
        options = {"adapter_path": m.adapter, "quantization": m.quantization}
        target = Target.from_pretrained(m.base, dtype=m.dtype, device=device, **options)
    V, most = target.vocab_size, target.max_positions
    data.require_ids_below(V)
    if cfg.data.max_length > most:
        raise EagleError(
            f"data.max_length={cfg.data.max_length} exceeds the {most} positions of {target.name}; "
            "lower it"
        )
    prompts = []
    if cfg.eval.num_prompts:
        held_out = load_dataset_for(cfg.data, tokenizer, split="eval", out_dir=output)
        held_out.require_ids_below(V)
        tell_shared(data.content, held_out.content)
        limit = most - cfg.eval.max_new_tokens
        if limit < 1:
            raise EagleError("eval.max_new_tokens leaves no room for a prompt; lower it")
        prompts = heldout_prompts(held_out, cfg.eval.num_prompts, limit)
    counts = data.token_counts(V)
    # end, FIM, chat and other added tokens that lie in the model's vocabulary
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    always = sorted(i for i in added if 0 <= i < V)
    torch.manual_seed(cfg.train.seed)
    head = _warm(cfg, target) if m.init_head else _fresh(cfg, target, counts, always)
    if draft_ids is not None:
        head.set_draft_vocab(draft_ids)
    target.set_feature_layers(head.config.feature_layers)
    states: Target | FeatureStore = target
    if cfg.data.features:
        states = FeatureStore(cfg.data.features)
        states.require_fit(Belongs.to(target), data, cfg.data)
    embed = target.embed
    if head.config.own_embedding:
        head.embed_tokens.requires_grad_(False)
        embed = copy.deepcopy(head.embed_tokens).to(device)  # ZeRO may split the head's weights
    ids, pad = head.draft_token_ids().cpu().numpy(), tokenizer.pad_token_id
    sources = {s.name: s.token_counts(V) for s in data.sources}
    who = target.identity["fingerprint"], target.identity["adapter"]
    provenance = {
        "target": target.identity,
        "tokenizer": tokenizer_hash(tokenizer),
        "data": {
            "format": cfg.data.format,
            "files": [p.name for p in data.paths],
            **{k: v for k, v in data.stats.items() if k != "cache_hit"},
            "answers": who_answered(data.paths, cfg.data.on_policy, *who),
        },
        "draft_vocabulary": coverage(counts, ids, always, sources),
    }
    seen = [data.stats[name] for name in ("rows", "tokens", "supervised_tokens")]
    identity = {
        "target": [*who, target.identity["quantization"]],
        "head": head.config.to_dict(),
        "data": [cfg.data.format, *seen, data.digest],
        "data.seed": cfg.data.seed,
        "train.seed": cfg.train.seed,
        "train.optimizer": cfg.train.optimizer,
    }
    pad = pad if pad is not None and 0 <= pad < V else 0
    notes = [describe(provenance["draft_vocabulary"])]
    if m.init_head and provenance["draft_vocabulary"]["coverage"] < LITTLE:
        notes.append(
            "that vocabulary, of --init_head, covers little of this data, and what it lacks is "
            "never drafted; without --init_head a head chooses its own"
        )
    return Parts(target, states, head, embed, data, prompts, provenance, identity, pad, notes)


def output_rows(target: Target) -> torch.Tensor:
    """The target's LM head as one matrix [V, H], which EAGLE-1 heads learn to draft through."""
    layer = target.model.get_output_embeddings()
    plain = layer.weight.is_floating_point() and getattr(layer, "bias", None) is None
    if not plain or target.head_logits.cap:
        raise EagleError(
            f"the LM head of {target.name} is not one plain matrix (it is quantized, has a bias or "
            "caps its logits), which model.method=eagle1 needs; train an eagle3 head"
        )
    rows = layer.weight.detach()
    return rows if target.head_logits.scale == 1.0 else rows * target.head_logits.scale


def fresh_config(m: ModelConfig, config, vocab_size: int, layers: tuple | None = None):
    """The `HeadConfig` that `m` asks for, over a target of text config `config`. layers: of its
    features."""
    half = min(32000, max(vocab_size // 2, 1))
    if m.method == "eagle1":
        half, layers = vocab_size, None
    return HeadConfig.for_target(
        config,
        vocab_size=vocab_size,
        draft_vocab_size=m.draft_vocab_size or half,
        intermediate_size=m.intermediate_size,
        feature_layers=m.feature_layers or layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        **_options(m),
    )


def _options(m: ModelConfig) -> dict:
    return {name: value for name in OPTIONS if (value := getattr(m, name, None)) is not None}


def _fresh(cfg: HeadTrainConfig, target: Target, counts: np.ndarray, always: list) -> DraftHead:
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
    ids = choose_draft_vocab(counts, always, size)
    head.set_draft_vocab(ids)
    rows = target.model.get_output_embeddings().weight
    if head.has_output and rows.is_floating_point():
        # the target's own rows know what each token looks like
        rows = rows.detach()[ids.to(rows.device)].float().cpu()
        std = config.hidden_size**-0.5
        head.lm_head.weight.data.copy_(rows / rows.std().clamp_min(1e-6) * std)
    return head


def _warm(cfg: HeadTrainConfig, target: Target) -> DraftHead:
    """The head to start from; its draft vocabulary stays, whatever the data holds."""
    head, _ = load_head(cfg.model.init_head, target, dtype="float32")
    renamed = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
    names = ["draft_vocab_size", "feature_layers", "intermediate_size", *renamed]
    for name in [*names, *_options(cfg.model)]:
        value, has = getattr(cfg.model, name), getattr(head.config, renamed.get(name, name))
        if value is not None and tuple(np.atleast_1d(value)) != tuple(np.atleast_1d(has)):
            raise EagleError(
                f"model.{name}={value} contradicts the head to start from, which has {has}; set "
                "that, or leave it out"
            )
    return head.requires_grad_(True)


def choose_draft_vocab(counts: np.ndarray, always: list[int], size: int) -> torch.Tensor:
    """counts [V]: how often a token is supervised -> ids [size] int64 sorted: `always`, then the
    most frequent, then the lowest unused ids; ties go to the lower id."""
    chosen = list(dict.fromkeys(always))[:size]
    taken = np.zeros(len(counts), dtype=bool)
    taken[chosen] = True
    ranked = np.argsort(-counts, kind="stable")  # unseen ones come last, lowest id first
    chosen += ranked[~taken[ranked]][: size - len(chosen)].tolist()
    return torch.tensor(sorted(chosen))


def coverage(
    counts: np.ndarray, ids: np.ndarray, always: Sequence[int] = (), sources: dict | None = None
) -> dict:
    """How much of the supervised tokens the draft vocabulary `ids` can express. always: the special
    tokens. sources: [V] counts of each source, by name."""

    def share(counts: np.ndarray) -> float:
        return float(counts[ids].sum() / max(counts.sum(), 1))

    return {
        "draft_vocab_size": len(ids),
        "vocab_size": len(counts),
        "distinct_supervised": int((counts > 0).sum()),
        "coverage": share(counts),
        "special_tokens": len(set(always) & set(ids.tolist())),
        "coverage_by_source": {name: share(each) for name, each in (sources or {}).items()},
    }


def describe(report: dict) -> str:
    """`coverage()` in one line."""
    by = ", ".join(f"{name} {share:.2%}" for name, share in report["coverage_by_source"].items())
    size = f"{report['draft_vocab_size']} of {report['vocab_size']} tokens"
    return f"draft vocabulary: {size} hold {report['coverage']:.2%} of what is supervised ({by})"
