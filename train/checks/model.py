"""The target: whether we can serve it, its size, its tokenizer and end tokens.

Loads weights only where they are small; knows nothing of data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from configs.schema import HeadTrainConfig
from eagle.checkpoint import load_head, require_fit
from eagle.errors import EagleError
from eagle.heads.head import HeadConfig
from eagle.loading import find_folder
from eagle.target import INSTEAD, Target, decoder_layers, refuse_encoder_decoder, refuse_unsupported
from records.tokens import load_tokenizer
from train.checks.findings import Finding, failed, note, ok, problem, size, warning
from train.head.setup import fresh_config

SMALL = 2 * 2**30  # bytes of weights up to which the model is loaded and probed


@dataclass
class Subject:
    """What is known of a target so far; None where a check before failed."""

    name: str
    config: Any = None  # the whole config; `text` is the language model's
    text: Any = None
    model: Any = None  # on the meta device: shapes without weights
    target: Target | None = None  # loaded, where small
    tokenizer: Any = None
    head: Any = None
    eos: set[int] = field(default_factory=set)
    weight_bytes: int = 0

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def head_config(self, cfg: HeadTrainConfig) -> HeadConfig:
        """The head that training would make, or the one that was given."""
        if self.head is not None:
            return self.head.config
        return fresh_config(cfg.model, self.text, self.vocab_size)


def target(subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """Fills `subject` as far as it gets."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        source = find_folder(cfg.model.base, weights=False)
    except EagleError as error:
        yield failed("target", error)
        return
    try:
        subject.config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        yield problem(
            "target",
            f"no model config in {str(source)!r}: {reason}",
            "give a folder with config.json and weights",
        )
        return
    kind = subject.config.model_type
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(subject.config)
    except Exception as error:  # constructors of models raise whatever they meet
        reason = " ".join(str(error).split())[:200]
        if "Unrecognized configuration class" in reason:
            yield problem(
                "target", f"models of type {kind!r} are not causal language models", INSTEAD
            )
        else:
            yield problem(
                "target",
                f"its configuration makes no {kind!r} model: {reason}",
                "repair config.json",
            )
        return
    try:
        refuse_encoder_decoder(model)
        text = model.config.get_text_config()
        backbone = model.get_decoder()
        refuse_unsupported(model, text, backbone, decoder_layers(backbone))
    except EagleError as error:
        yield failed("target", error)
        return
    subject.model, subject.text = model, text
    parameters = sum(p.numel() for p in model.parameters())
    subject.weight_bytes = weight_bytes(source, model, cfg.model.dtype)
    facts = (
        f"{subject.name}: {kind}, {parameters / 1e6:.1f} M parameters, {size(subject.weight_bytes)}"
    )
    if subject.weight_bytes > SMALL:
        yield ok("target", f"{facts}; nothing in its configuration or code speaks against it")
        yield note(
            "target",
            "too large to be loaded here: logits were not compared",
            "the comparison is made whenever the target is loaded; run a short train.max_steps=2 first",
        )
        return
    try:
        subject.target = Target.from_pretrained(
            cfg.model.base,
            dtype=cfg.model.dtype,
            device="cpu",
            feature_layers=cfg.model.feature_layers,
        )
    except EagleError as error:
        yield failed("target", error)
        return
    yield ok(
        "target", f"{facts}; loaded, and its logits through our attention are the stock model's"
    )


def weight_bytes(source: str | Path, model: torch.nn.Module, dtype: str) -> int:
    """Bytes of the loaded weights: as stored, or in the dtype asked for."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    if dtype in sizes:
        return sizes[dtype] * sum(p.numel() for p in model.parameters())
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = list(Path(source).glob(pattern)) if Path(source).is_dir() else []
        if files:
            return sum(file.stat().st_size for file in files)
    stored = getattr(model.config, "dtype", None)
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else 2
    return itemsize * sum(p.numel() for p in model.parameters())


def tokens(subject: Subject, cfg: HeadTrainConfig, formats: set[str]) -> Iterator[Finding]:
    """Tokenizer: end, pad and FIM tokens, and whether it fits the model. formats: of the data, if
    any.
    """
    subject.tokenizer = tokenizer = load_tokenizer(cfg.model.base)
    vocab_size = subject.vocab_size if subject.model is not None else None
    subject.eos = model_eos(subject, cfg)
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        yield problem(
            "tokenizer",
            f"it has ids up to {largest}, the model only {vocab_size} embeddings",
            "use the model's own tokenizer, or resize its embeddings",
        )
    else:
        yield ok("tokenizer", f"{largest + 1} tokens, all within the model's vocabulary")
    yield from _end_token(subject, vocab_size)
    pad = tokenizer.pad_token_id
    if pad is None:
        yield note(
            "pad token",
            "the tokenizer has none",
            "nothing to do: rows are padded with 0 and masked by length",
        )
    elif pad in subject.eos:
        yield ok(
            "pad token",
            "it is an end token too; masks go by length, so real end tokens stay supervised",
        )
    else:
        yield ok("pad token", repr(tokenizer.pad_token))
    yield from _fim(subject, cfg, "fim" in formats)
    if "chat" in formats and not getattr(tokenizer, "chat_template", None):
        yield problem(
            "chat template",
            "the tokenizer has none, and the data is chat",
            "use an instruct model, put a chat_template.jinja beside its tokenizer, or set "
            "data.format=instruction",
        )


def model_eos(subject: Subject, cfg: HeadTrainConfig) -> set[int]:
    """The ids at which generation stops: generation_config.json, else config.json."""
    from transformers import GenerationConfig

    found = None
    try:
        source = find_folder(cfg.model.base, weights=False)
        found = GenerationConfig.from_pretrained(source).eos_token_id
    except (OSError, ValueError):  # the file is optional
        pass
    if found is None:
        found = getattr(subject.text or subject.config, "eos_token_id", None)
    if found is None:
        return set()
    return set(found) if isinstance(found, (list, tuple)) else {found}


def _end_token(subject: Subject, vocab_size: int | None) -> Iterator[Finding]:
    tokenizer = subject.tokenizer
    end, name = tokenizer.eos_token_id, tokenizer.eos_token
    if end is None:
        yield problem(
            "end token",
            "the tokenizer has none, so supervised rows end without one",
            "set eos_token in tokenizer_config.json to the token at which the model stops",
        )
    elif vocab_size is not None and end >= vocab_size:
        yield problem(
            "end token",
            f"{name!r} has id {end}, outside the model's {vocab_size}",
            "use the model's own tokenizer, or resize its embeddings",
        )
    elif not subject.eos:
        yield warning(
            "end token",
            "the model's configuration names none: generation stops only at its length limit",
            f"set eos_token_id to {end} in generation_config.json",
        )
    elif end not in subject.eos:
        names = tokenizer.convert_ids_to_tokens(sorted(subject.eos))
        yield warning(
            "end token",
            f"the tokenizer's {name!r} ({end}) is not among the model's end tokens {names}",
            f"add {end} to eos_token_id in generation_config.json, if texts end with it",
        )
    else:
        yield ok("end token", f"{name!r} ({end}) stops the model")


def _fim(subject: Subject, cfg: HeadTrainConfig, needed: bool) -> Iterator[Finding]:
    try:
        found = find_fim_tokens(subject.tokenizer, cfg.data.fim_tokens)
    except ConfigError as error:
        what, _, remedy = str(error).partition(": ")
        yield (problem if needed else note)("fim tokens", what, remedy)
        return
    end = subject.tokenizer.convert_ids_to_tokens(found.eot)
    if needed and subject.eos and found.eot not in subject.eos:
        yield warning(
            "fim tokens",
            f"{found.family}: a middle ends with {end!r} ({found.eot}), which does not stop the model",
            f"add {found.eot} to eos_token_id in generation_config.json, or name another eot in "
            "data.fim_tokens",
        )
    else:
        yield ok("fim tokens", f"{found.family}, a middle ends with {end!r}")


def head(subject: Subject, path: str) -> Iterator[Finding]:
    """Whether a trained head fits the target."""
    if subject.model is None:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if subject.target is not None:
            found, provenance = load_head(path, subject.target)
        else:
            found, provenance = load_head(path)
            shapes = SimpleNamespace(
                config=subject.text,
                vocab_size=subject.vocab_size,
                name=subject.name,
                layers=range(subject.text.num_hidden_layers),
            )
            require_fit(Path(path), found.config, shapes)
    subject.head = found
    for warned in caught:
        yield warning("head", str(warned.message), "use the head that was trained for this target")
    weights = sum(p.numel() for p in found.parameters())
    steps = (provenance.get("training") or {}).get("step")
    trained = f", trained for {steps} steps" if steps is not None else ""
    yield ok(
        "head",
        f"{path}: {weights / 1e6:.1f} M parameters, draft vocabulary {found.config.draft_vocab_size}"
        f"{trained}",
    )
