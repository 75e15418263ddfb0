"""The doctor's findings about a target, its tokenizer, a head, data, and what a run needs."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig, HeadTrainConfig, MixtureSource
from eagle.checkpoint import load_head, require_fit
from eagle.errors import EagleError
from eagle.heads.head import HeadConfig, make_head, mlp_width
from eagle.loading import find_folder
from eagle.support import INSTEAD, supported_parts
from eagle.target import Target
from records.quarantine import BadRow, object_of
from records.render import make_renderer
from records.rows import Row, RowError
from records.sources import SHIPPED_FORMATS, read_records, resolve, shipped
from records.tokens import load_tokenizer
from train.doctor_machine import Finding, folders, free_bytes, guarded, size
from train.head.setup import choose_draft_vocab, coverage, fresh_config, settle, special_ids
from train.head.teacher import LOGITS

SMALL = 2 * 2**30  # bytes of weights up to which the target is loaded and probed
RECORDS = 2000  # of each source that are rendered
ANSWERED = ("chat", "instruction", "fim")  # formats whose rows are a prompt and an answer


@dataclass
class Subject:
    """What is known of a target so far; None where a check before failed."""

    name: str
    text: Any = None  # the language model's config
    model: Any = None  # on the meta device: shapes without weights
    target: Target | None = None  # loaded, where small
    tokenizer: Any = None
    head: Any = None
    eos: set[int] = field(default_factory=set)  # where the model stops
    weight_bytes: int = 0

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def head_config(self, cfg: HeadTrainConfig) -> HeadConfig:
        """Of the head that was given, or that training would make."""
        if self.head is not None:
            return self.head.config
        return fresh_config(cfg.model, self.text, self.vocab_size)


@dataclass
class Sample:
    """The rows of one source's first records."""

    name: str
    format: str
    rows: list[Row]
    bad: list[BadRow]
    records: int
    whole: bool


def examine(
    cfg: HeadTrainConfig, head: str | None, with_data: bool, num: int
) -> Iterator[tuple[str, list[Finding], Callable | None]]:
    """The parts `Target`, `Data` and `Needs`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = settle(cfg, device)
    subject = Subject(cfg.model.base or "embedded")
    listed = sources(cfg.data) if with_data else []
    found = guarded("target", partial(target, subject, cfg))
    formats = {source.format for source in listed}
    found += guarded("tokenizer", partial(tokens, subject, cfg, formats))
    if head is not None:
        found += guarded("head", partial(fit, subject, head))
    yield "Target", found, None
    if listed and subject.tokenizer is not None:
        sampled: list[Sample] = []
        found = []
        for source in listed:
            found += guarded("data", partial(data, source, subject, cfg, sampled))
        if sampled and subject.model is not None:
            found += guarded("draft vocabulary", partial(vocabulary, sampled, subject, cfg))
        yield "Data", found, partial(show, sampled, subject.tokenizer, num)
    if subject.model is not None:
        yield "Needs", guarded("needs", partial(needs, subject, cfg, device)), None


# target, tokenizer, head


def target(subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """Fills `subject` as far as it gets."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = find_folder(cfg.model.base, weights=False)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # validators of configs raise whatever they like
        text = f"no model config in {str(source)!r}: {' '.join(str(error).split())[:200]}"
        yield Finding("problem", "target", text, "give a folder with config.json and weights")
        return
    kind = config.model_type
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # so do constructors of models
        text = " ".join(str(error).split())[:200]
        if "Unrecognized configuration class" in text:
            text = f"models of type {kind!r} are not causal language models"
            yield Finding("problem", "target", text, INSTEAD)
        else:
            text = f"its configuration makes no {kind!r} model: {text}"
            yield Finding("problem", "target", text, "repair config.json")
        return
    subject.text, _, _ = supported_parts(model)
    subject.model = model
    subject.weight_bytes = weight_bytes(source, model, cfg.model.dtype)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    facts = f"{subject.name}: {kind}, {count:.1f} M parameters, {size(subject.weight_bytes)}"
    if subject.weight_bytes > SMALL:
        yield Finding("ok", "target", f"{facts}; nothing in its configuration speaks against it")
        text = "too large to be loaded here: logits were not compared"
        yield Finding("note", "target", text, "run train.main with train.max_steps=2 first")
        return
    subject.target = Target.from_pretrained(
        cfg.model.base, dtype=cfg.model.dtype, device="cpu", feature_layers=cfg.model.feature_layers
    )
    yield Finding("ok", "target", f"{facts}; its logits through our attention are the stock ones")


def weight_bytes(source: str | Path, model: torch.nn.Module, dtype: str) -> int:
    """Bytes of the loaded weights: as stored, or in the dtype asked for."""
    count = sum(p.numel() for p in model.parameters())
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return sizes[dtype] * count if dtype in sizes else stored or 2 * count


def tokens(subject: Subject, cfg: HeadTrainConfig, formats: set[str]) -> Iterator[Finding]:
    """The tokenizer fits the model, and has the tokens that the data's formats need."""
    subject.tokenizer = tokenizer = load_tokenizer(cfg.model.base)
    subject.eos = model_eos(subject, cfg)
    largest = max(tokenizer.get_vocab().values())
    if subject.model is not None and largest >= subject.vocab_size:
        text = f"it has ids up to {largest}, the model only {subject.vocab_size} embeddings"
        remedy = "use the model's own tokenizer, or resize its embeddings"
        yield Finding("problem", "tokenizer", text, remedy)
    else:
        yield Finding("ok", "tokenizer", f"{largest + 1} tokens, all in the model's vocabulary")
    end, name = tokenizer.eos_token_id, tokenizer.eos_token
    add = f"add {end} to eos_token_id in generation_config.json"
    if end is None:
        text = "the tokenizer has none, so supervised rows end without one"
        remedy = "set eos_token in tokenizer_config.json to the token at which the model stops"
        yield Finding("problem", "end token", text, remedy)
    elif not subject.eos:
        text = "the model's configuration names none: generation stops only at its length limit"
        yield Finding("warning", "end token", text, add)
    elif end not in subject.eos:
        names = tokenizer.convert_ids_to_tokens(sorted(subject.eos))
        text = f"the tokenizer's {name!r} ({end}) is not among the model's end tokens {names}"
        yield Finding("warning", "end token", text, f"{add}, if texts end with it")
    else:
        yield Finding("ok", "end token", f"{name!r} ({end}) stops the model")
    if "fim" in formats:
        try:
            fim = find_fim_tokens(tokenizer, cfg.data.fim_tokens)
        except ConfigError as error:
            text, _, remedy = str(error).partition(": ")
            yield Finding("problem", "fim tokens", text, remedy)
        else:
            yield Finding("ok", "fim tokens", f"{fim.family}")
    if "chat" in formats and not getattr(tokenizer, "chat_template", None):
        text = "the tokenizer has none, and the data is chat"
        remedy = (
            "use an instruct model, put a chat_template.jinja beside its tokenizer, or set "
            "data.format=instruction"
        )
        yield Finding("problem", "chat template", text, remedy)


def model_eos(subject: Subject, cfg: HeadTrainConfig) -> set[int]:
    """The ids at which generation stops: generation_config.json, else config.json."""
    from transformers import GenerationConfig

    try:
        folder = find_folder(cfg.model.base, weights=False)
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):  # the file is optional
        found = None
    if found is None:
        found = getattr(subject.text, "eos_token_id", None)
    return set() if found is None else set(np.atleast_1d(found).tolist())


def fit(subject: Subject, path: str) -> Iterator[Finding]:
    """Does a trained head fit the target?"""
    if subject.model is None:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head, provenance = load_head(path, *filter(None, [subject.target]))
    if subject.target is None:
        shapes = SimpleNamespace(
            config=subject.text,
            vocab_size=subject.vocab_size,
            name=subject.name,
            layers=range(subject.text.num_hidden_layers),
        )
        require_fit(Path(path), head.config, shapes)
    subject.head = head
    for warned in caught:
        remedy = "use the head that was trained for this target"
        yield Finding("warning", "head", str(warned.message), remedy)
    count = sum(p.numel() for p in head.parameters()) / 1e6
    steps = (provenance.get("training") or {}).get("step")
    text = f"{path}: {count:.1f} M parameters, draft vocabulary {head.config.draft_vocab_size}"
    yield Finding("ok", "head", text + (f", trained for {steps} steps" if steps else ""))


# data


def sources(cfg: DataConfig) -> list[MixtureSource]:
    if cfg.format != "mixed":
        return [MixtureSource(format=cfg.format, path=cfg.path)]
    return cfg.mixture or [MixtureSource(format=name) for name in SHIPPED_FORMATS]


def take(source: MixtureSource, cfg: DataConfig, tokenizer: Any) -> Sample:
    """Renders the first RECORDS records of a source."""
    file = shipped(source.format, "train")
    if source.paths is None and file is None:
        raise EagleError(f"no {source.format} data set is shipped; give data.path (--data FILE)")
    files = [file] if source.paths is None else resolve(source.paths)
    render = make_renderer(source.format, cfg, tokenizer)
    records = chain.from_iterable(map(read_records, files))
    sample = Sample(source.name or source.format, source.format, [], [], 0, False)
    for record in islice(records, RECORDS):
        sample.records += 1
        try:
            sample.rows += render(object_of(record))
        except RowError as error:
            sample.bad.append(BadRow.of(record, error))
    sample.whole = next(records, None) is None
    return sample


def data(
    source: MixtureSource, subject: Subject, cfg: HeadTrainConfig, sampled: list[Sample]
) -> Iterator[Finding]:
    """Findings about one source, whose sample goes to `sampled`."""
    if source.eval_paths:
        resolve(source.eval_paths)
    sample = take(source, cfg.data, subject.tokenizer)
    rows, name = sample.rows, source.name or source.format
    too_many = len(sample.bad) > cfg.data.max_bad_fraction * sample.records
    for reason, count in Counter(row.reason for row in sample.bad).most_common():
        first = next(row for row in sample.bad if row.reason == reason)
        text = f"{name}: {count} of {sample.records} records are unusable: {reason} "
        text += f"(first: {first.where}: {first.message})"
        yield Finding("problem" if too_many else "warning", "data", text, first.remedy)
    if not rows:
        text = f"{name}: no row of {sample.records} records is left"
        yield Finding("problem", "data", text, "repair the data, or name another file")
        return
    sampled.append(sample)
    cut = sum(row.truncated for row in rows)
    if cut > 0.1 * len(rows):
        text = f"{name}: {cut} of {len(rows)} rows are cut at {cfg.data.max_length} tokens"
        remedy = "raise data.max_length, or shorten what precedes the answers"
        yield Finding("warning", "data", text, remedy)
    total = sum(len(row.input_ids) for row in rows)
    supervised = sum(sum(row.loss_mask) for row in rows)
    seen = "all" if sample.whole else "the first"
    text = f"{name}: {seen} {sample.records} records give {len(rows)} rows, {total} tokens, "
    text += f"{supervised / total:.1%} supervised"
    look = "see with train.inspect what is masked"
    if sample.whole and supervised < cfg.data.min_supervised_tokens:
        text += f": {supervised} supervised tokens are too few"
        yield Finding("problem", "data", text, f"add data, or {look}")
    elif supervised < 0.02 * total:
        yield Finding("warning", "data", text, f"shorten the context, or {look}")
    elif supervised > 0.95 * total and sample.format in ANSWERED:
        yield Finding("warning", "data", f"{text}: prompts too?", look)
    else:
        yield Finding("ok", "data", text)
    if sample.format in ANSWERED:
        yield from stops(sample, subject)


def stops(sample: Sample, subject: Subject) -> Iterator[Finding]:
    """Does the token that ends a row's answer stop the model?"""
    last = (
        row.input_ids[max(np.flatnonzero(row.loss_mask))]
        for row in sample.rows
        if not row.truncated
    )
    ends = Counter(last)
    total, name = ends.total(), sample.name
    others = Counter({token: n for token, n in ends.items() if token not in subject.eos})
    if others.total() <= 0.05 * total:
        yield Finding("ok", "stop tokens", f"{name}: answers end with a token that stops the model")
        return
    token, count = others.most_common(1)[0]
    shown = repr(subject.tokenizer.decode([token]))
    if token in subject.tokenizer.added_tokens_decoder:
        text = f"{name}: {count} of {total} answers end with {shown} ({token}), which does not "
        remedy = f"add {token} to eos_token_id in generation_config.json"
        yield Finding("warning", "stop tokens", text + "stop the model", remedy)
    else:
        text = f"{name}: {others.total()} of {total} answers end without an end token (often "
        remedy = "let the chat template end answers with the model's end token, or set eos_token"
        yield Finding("warning", "stop tokens", text + f"{shown})", remedy)


def vocabulary(sampled: list[Sample], subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """How much of the answers the draft vocabulary holds: chosen on one half of the rows, measured
    on the other."""
    V = subject.vocab_size
    D = subject.head_config(cfg).draft_vocab_size
    counts = np.zeros((2, V), dtype=np.int64)
    for index, row in enumerate(chain.from_iterable(sample.rows for sample in sampled)):
        ids = np.asarray(row.input_ids)[np.asarray(row.loss_mask) == 1]
        counts[index % 2] += np.bincount(ids[ids < V], minlength=V)
    if subject.head is not None:
        ids, remedy = subject.head.draft_token_ids().numpy(), "train a head on data like this"
        share, few = coverage(counts.sum(0), ids)["coverage"], False
    else:
        always, remedy = special_ids(subject.tokenizer, V), "raise model.draft_vocab_size"
        if len(always) > D:
            text = f"{D} tokens cannot hold the {len(always)} special ones"
            yield Finding("problem", "draft vocabulary", text, remedy)
            return
        ids = choose_draft_vocab(counts[0], always, D).numpy()
        share = coverage(counts[1] if counts[1].any() else counts[0], ids)["coverage"]
        few = counts.sum() < 20 * D
    text = f"{len(ids)} of {V} tokens hold {share:.1%} of the answers"
    text += " (few rows were looked at: more data may show more)" if few else ""
    if share < 0.5:
        yield Finding("problem", "draft vocabulary", text, remedy)
    elif share < 0.95:
        yield Finding("note" if few else "warning", "draft vocabulary", text, remedy)
    else:
        yield Finding("ok", "draft vocabulary", text)


def show(sampled: list[Sample], tokenizer: Any, num: int, console: Any) -> None:
    """`num` rows in all, spread over the sources."""
    from train.inspect import print_sample

    for n in range(num if sampled else 0):
        sample = sampled[n % len(sampled)]
        index = n // len(sampled) * max(1, len(sample.rows) // num) % len(sample.rows)
        row = sample.rows[index]._asdict() | {"format": sample.format}
        print_sample(console, row, index, tokenizer)


# memory and disk


def needs(subject: Subject, cfg: HeadTrainConfig, device: torch.device) -> Iterator[Finding]:
    """Memory of a process and disk of a run, estimates, against what is free."""
    config = subject.head_config(cfg)
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_head(config).parameters())
    need = {"target": subject.weight_bytes} | head_memory(cfg, config, weights, device)
    need["passing"] += passing_memory(cfg, config, mlp_width(subject.text))
    total, left = sum(need.values()), available_memory(device)
    parts = ", ".join(f"{name} {size(value)}" for name, value in need.items())
    text = f"training takes about {size(total)} ({parts}); {size(left)} free on {device.type}"
    remedy = (
        "lower train.batch_size or data.max_length, set train.checkpoint_activations=true, spread "
        "with train.zero=2 over more GPUs, or use a smaller target"
    )
    level = "problem" if total > left else "warning" if total > 0.8 * left else "ok"
    yield Finding(level, "memory", text, "" if level == "ok" else remedy)
    one, output = checkpoint_bytes(cfg, weights), folders(cfg)["train.output"]
    kept = one * (cfg.train.save_total_limit + 2)  # the best one, and the one being written
    text = f"a checkpoint takes {size(one)}, those that are kept {size(kept)}; "
    text += f"{size(free_bytes(output))} free for {output}"
    if kept > free_bytes(output):
        remedy = "free some space, choose another --output, or lower train.save_total_limit"
        yield Finding("problem", "disk", text, remedy)
    else:
        yield Finding("ok", "disk", text)


def head_memory(
    cfg: HeadTrainConfig, head: HeadConfig, weights: int, device: torch.device
) -> dict[str, int]:
    """Bytes. W weights of the head, S unrolled steps, N padded tokens of a micro-batch, all
    supervised, H hidden and I MLP width of the head, s bytes a number.

    head         W · (4 weights + 4 gradients), fp32
    optimizer    W · 8 for AdamW's two moments, W · 4 for Muon's one; over the processes under ZeRO
    activations  kept for the backward pass: S·N·(57·H + 4·s·I), or S·N·16·H when they are
                 recomputed (counted with torch.autograd.graph.saved_tensors_hooks)
    passing      three tiles of logits in fp32
    """
    t = cfg.train
    N, s = tokens_of_a_batch(cfg), 2 if t.dtype == "bf16" else 4
    kept = 16 * head.hidden_size
    if not t.checkpoint_activations:
        kept = 57 * head.hidden_size + 4 * s * head.intermediate_size
    world = int(os.environ.get("WORLD_SIZE", "1")) if t.zero else 1
    return {
        "head": 8 * weights,
        "optimizer": (4 if t.optimizer == "muon" else 8) * weights // world,
        "activations": t.ttt_steps * N * kept,
        "passing": 3 * 4 * LOGITS * (1 if device.type == "cpu" else 16),
    }


def passing_memory(cfg: HeadTrainConfig, head: HeadConfig, target_width: int) -> int:
    """Bytes of the target's pass: N·s·(F + 8·H + 2·I), its H and I, features F = 3·H."""
    s = 2 if cfg.train.dtype == "bf16" else 4
    return tokens_of_a_batch(cfg) * s * (11 * head.target_hidden_size + 2 * target_width)


def tokens_of_a_batch(cfg: HeadTrainConfig) -> int:
    return cfg.train.max_tokens_per_batch or cfg.train.batch_size * cfg.data.max_length


def checkpoint_bytes(cfg: HeadTrainConfig, weights: int) -> int:
    """Weights and moments in fp32, and the head as it is exported."""
    moments = 4 if cfg.train.optimizer == "muon" else 8
    return weights * (4 + moments + (2 if cfg.train.dtype == "bf16" else 4))


def available_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of this process's memory limit (container included)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    left = psutil.virtual_memory().available
    try:
        limit, used = (
            Path("/sys/fs/cgroup", name).read_text().strip()
            for name in ("memory.max", "memory.current")
        )
    except OSError:
        return left
    return min(left, max(int(limit) - int(used), 0)) if limit.isdigit() else left
