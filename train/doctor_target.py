"""The doctor's findings about a target, its tokenizer, a head, data, and what a run needs."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from configs.schema import HeadTrainConfig
from eagle.checkpoint import load_head, require_fit
from eagle.heads.head import HeadConfig, make_head, mlp_width
from eagle.loading import find_folder
from eagle.support import INSTEAD, supported_parts
from eagle.target import Target
from records import TokenizedData, load_dataset_for, load_tokenizer
from records.dataset import Source
from train.doctor_machine import Finding, guarded, one_line, size
from train.head.setup import fresh_config, settle
from train.head.teacher import LOGITS
from train.inspect import print_samples

SMALL = 2 * 2**30  # bytes of weights up to which the target is loaded and probed
ROWS = 2000  # of each source whose last token is looked at
ANSWERED = ("chat", "instruction", "fim")  # formats whose rows are a prompt and an answer


@dataclass
class Subject:
    """What is known of a target so far; None where a check before failed."""

    name: str
    text: Any = None  # the language model's config
    model: Any = None  # on the meta device: shapes without weights
    target: Target | None = None  # loaded, where small
    tokenizer: Any = None
    head: HeadConfig | None = None  # that was given
    eos: frozenset[int] = frozenset()  # where the model stops
    weight_bytes: int = 0

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]


def examine(
    cfg: HeadTrainConfig, head: str | None, with_data: bool, num: int
) -> Iterator[tuple[str, list[Finding], Callable | None]]:
    """The parts `Target`, `Data` and `Needs`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = settle(cfg, device)
    subject = Subject(cfg.model.base or "embedded")
    found = guarded("target", partial(target, subject, cfg))
    found += guarded("tokenizer", partial(tokens, subject, cfg))
    if head is not None:
        found += guarded("head", partial(fit, subject, head))
    yield "Target", found, None
    if with_data and subject.tokenizer is not None:
        kept: list[TokenizedData] = []
        found = guarded("data", partial(data, subject, cfg, kept))
        show = partial(print_samples, kept[0], num, subject.tokenizer) if kept else None
        yield "Data", found, show
    if subject.model is not None:
        yield "Needs", guarded("needs", partial(needs, subject, cfg, device)), None


# target, tokenizer, head


def target(subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """Fills `subject` as far as it gets."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, remedy = find_folder(cfg.model.base, weights=False), "give a folder with config.json"
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # validators of configs and constructors raise whatever they like
        text = f"no causal language model can be made of {source}: {one_line(error)}"
        instead = INSTEAD if "Unrecognized configuration class" in text else remedy
        yield Finding("problem", "target", text, instead)
        return
    subject.text, _, _ = supported_parts(model)
    subject.model = model
    subject.weight_bytes = weight_bytes(source, model, cfg.model.dtype)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    facts = f"{subject.name}: {config.model_type}, {count:.1f} M parameters, "
    facts += size(subject.weight_bytes)
    if subject.weight_bytes > SMALL:
        yield Finding("ok", "target", f"{facts}; nothing in its configuration speaks against it")
        text = "too large to be loaded here: logits were not compared"
        yield Finding("note", "target", text, "run train.main with train.max_steps=2 first")
        return
    subject.target = Target.from_pretrained(
        cfg.model.base, dtype=cfg.model.dtype, device="cpu", feature_layers=cfg.model.feature_layers
    )
    yield Finding("ok", "target", f"{facts}; its logits through our attention are the stock ones")


def weight_bytes(source: Path, model: torch.nn.Module, dtype: str) -> int:
    """Bytes of the loaded weights: as stored, or in the dtype asked for."""
    count = sum(p.numel() for p in model.parameters())
    if dtype != "auto":
        return getattr(torch, dtype).itemsize * count
    return sum(file.stat().st_size for file in source.glob("*.safetensors")) or 2 * count


def tokens(subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """Does the tokenizer fit the model?"""
    subject.tokenizer = tokenizer = load_tokenizer(cfg.model.base)
    subject.eos = model_eos(subject, cfg)
    largest = max(tokenizer.get_vocab().values())
    fits = subject.model is None or largest < subject.vocab_size
    text = f"{largest + 1} tokens, all in the model's vocabulary"
    if not fits:
        text = f"it has ids up to {largest}, the model only {subject.vocab_size} embeddings"
    remedy = "use the model's own tokenizer, or resize its embeddings"
    yield Finding.of(fits, "tokenizer", text, remedy)


def model_eos(subject: Subject, cfg: HeadTrainConfig) -> frozenset[int]:
    """The ids at which generation stops: generation_config.json, else config.json."""
    from transformers import GenerationConfig

    found = getattr(subject.text, "eos_token_id", None)
    try:
        folder = find_folder(cfg.model.base, weights=False)
        given = GenerationConfig.from_pretrained(folder).eos_token_id
        found = found if given is None else given
    except (OSError, ValueError):  # the file is optional
        pass
    return frozenset() if found is None else frozenset(np.atleast_1d(found).tolist())


def fit(subject: Subject, path: str) -> Iterator[Finding]:
    """Does a trained head fit the target?"""
    if subject.model is None:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head, provenance = load_head(path, subject.target)
    if subject.target is None:
        config, V, layers = subject.text, subject.vocab_size, range(subject.text.num_hidden_layers)
        shapes = SimpleNamespace(config=config, vocab_size=V, name=subject.name, layers=layers)
        require_fit(Path(path), head.config, shapes)
    subject.head = head.config
    for warned in caught:
        remedy = "use the head that was trained for this target"
        yield Finding("warning", "head", str(warned.message), remedy)
    count = sum(p.numel() for p in head.parameters()) / 1e6
    steps = (provenance.get("training") or {}).get("step")
    text = f"{path}: {count:.1f} M parameters, draft vocabulary {head.config.draft_vocab_size}"
    yield Finding("ok", "head", text + (f", trained for {steps} steps" if steps else ""))


# data


def data(subject: Subject, cfg: HeadTrainConfig, kept: list[TokenizedData]) -> Iterator[Finding]:
    """The data set is tokenised whole, into the cache that a run reads; it goes to `kept`."""
    lenient = cfg.data.model_copy(update={"max_bad_fraction": 1.0})
    loaded = load_dataset_for(lenient, subject.tokenizer)
    kept.append(loaded)
    bad, records = loaded.bad_rows, loaded.stats["records"]
    level = "problem" if len(bad) > cfg.data.max_bad_fraction * records else "warning"
    for reason, times in Counter(row.reason for row in bad).most_common():
        first = next(row for row in bad if row.reason == reason)
        text = f"{times} of {records} records are unusable: {reason} "
        text += f"(first: {first.where}: {first.message})"
        yield Finding(level, "data", text, first.remedy)
    look = "see with train.inspect what is masked"
    supervised, minimum = loaded.stats["supervised_tokens"], cfg.data.min_supervised_tokens
    if supervised < minimum:
        text = f"{supervised} supervised tokens, fewer than data.min_supervised_tokens={minimum}"
        yield Finding("problem", "data", text, f"add data, or {look}")
    for source in loaded.sources:
        mask, truncated = source.column("loss_mask"), source.column("truncated")
        cut, name, answered = int(truncated.sum()), source.name, source.format in ANSWERED
        if cut > 0.1 * len(source):
            text = f"{name}: {cut} of {len(source)} rows are cut at {cfg.data.max_length} tokens"
            remedy = "raise data.max_length, or shorten what precedes the answers"
            yield Finding("warning", "data", text, remedy)
        text = f"{name}: {len(source)} rows, {len(mask)} tokens, {mask.mean():.1%} supervised"
        usual = 0.02 <= mask.mean() <= (0.95 if answered else 1)
        remedy = f"are prompts and answers told apart? {look}"
        yield Finding.of(usual, "data", text, remedy, "warning")
        if answered:
            yield stops(source, np.flatnonzero(truncated == 0)[:ROWS], subject)
    if cfg.eval.num_prompts:
        load_dataset_for(lenient, subject.tokenizer, split="eval")


def stops(source: Source, rows: np.ndarray, subject: Subject) -> Finding:
    """Does the token that ends a row's answer stop the model?"""
    found = (source[int(n)] for n in rows)
    ends = Counter(row["input_ids"][max(np.flatnonzero(row["loss_mask"]))] for row in found)
    others = Counter({token: n for token, n in ends.items() if token not in subject.eos})
    text = f"{source.name}: answers end with a token that stops the model"
    remedy = "let the chat template end answers with the model's end token, or set eos_token"
    if others:
        token = others.most_common(1)[0][0]
        shown = f"{subject.tokenizer.decode([token])!r} ({token})"
        text = f"{source.name}: {others.total()} of {len(rows)} answers do not end with a token "
        text += f"that stops the model, often with {shown}"
        if token in subject.tokenizer.added_tokens_decoder:
            remedy = f"add {token} to eos_token_id in generation_config.json"
    good = others.total() <= 0.05 * len(rows)
    return Finding.of(good, "stop tokens", text, remedy, "warning")


# memory and disk


def needs(subject: Subject, cfg: HeadTrainConfig, device: torch.device) -> Iterator[Finding]:
    """Memory of a process and disk of a run, estimates, against what is free."""
    config, t = subject.head or fresh_config(cfg.model, subject.text, subject.vocab_size), cfg.train
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_head(config).parameters())
    need = memory(cfg, config, weights, mlp_width(subject.text), device)
    need = {"target": subject.weight_bytes, **need}
    total, left = sum(need.values()), available_memory(device)
    parts = ", ".join(f"{name} {size(value)}" for name, value in need.items())
    text = f"training takes about {size(total)} ({parts}); {size(left)} free on {device.type}"
    remedy = "lower train.batch_size or data.max_length, set train.checkpoint_activations=true, "
    remedy += "spread with train.zero=2 over more GPUs, or use a smaller target"
    level = "problem" if total > left else "warning"
    yield Finding.of(total <= 0.8 * left, "memory", text, remedy, level)
    # weights and moments in fp32, and the head as it is exported
    one = weights * (4 + moments(cfg) + number_bytes(cfg))
    kept = one * (t.save_total_limit + 2)  # the best one, and the one being written
    output = Path(t.output or "runs").expanduser().absolute()
    left = disk_usage(next(p for p in (output, *output.parents) if p.exists())).free
    text = f"a checkpoint takes {size(one)}, those that are kept {size(kept)}; "
    text += f"{size(left)} free for {output}"
    remedy = "free some space, choose another --output, or lower train.save_total_limit"
    yield Finding.of(kept <= left, "disk", text, remedy)


def moments(cfg: HeadTrainConfig) -> int:
    """Bytes a weight: AdamW keeps two numbers, Muon one."""
    return 4 if cfg.train.optimizer == "muon" else 8


def number_bytes(cfg: HeadTrainConfig) -> int:
    return 2 if cfg.train.dtype == "bf16" else 4


def memory(
    cfg: HeadTrainConfig, head: HeadConfig, weights: int, target_width: int, device: torch.device
) -> dict[str, int]:
    """Bytes. W weights of the head, S unrolled steps, N padded tokens of a micro-batch, all
    supervised, H hidden and I MLP width of the head, H' and I' of the target, s bytes a number.

    head         W · (4 weights + 4 gradients), fp32
    optimizer    W · 8 for AdamW's two moments, W · 4 for Muon's one; over the processes under ZeRO
    activations  kept for the backward pass: S·N·(57·H + 4·s·I), or S·N·16·H when they are
                 recomputed (counted with torch.autograd.graph.saved_tensors_hooks)
    passing      three tiles of logits in fp32, and the target's pass: N·s·(3·H' + 8·H' + 2·I')
    """
    t = cfg.train
    N, s = t.max_tokens_per_batch or t.batch_size * cfg.data.max_length, number_bytes(cfg)
    kept = 57 * head.hidden_size + 4 * s * head.intermediate_size
    kept = 16 * head.hidden_size if t.checkpoint_activations else kept
    tiles = 3 * 4 * LOGITS * (1 if device.type == "cpu" else 16)
    shares = int(os.environ.get("WORLD_SIZE", 1)) if t.zero else 1
    return {
        "head": 8 * weights,
        "optimizer": moments(cfg) * weights // shares,
        "activations": t.ttt_steps * N * kept,
        "passing": tiles + N * s * (11 * head.target_hidden_size + 2 * target_width),
    }


def available_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of this process's memory limit (container included)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    left, files = psutil.virtual_memory().available, ("memory.max", "memory.current")
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in files)
    except OSError:
        return left
    return min(left, max(int(limit) - int(used), 0)) if limit.isdigit() else left
