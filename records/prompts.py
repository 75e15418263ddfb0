"""Prompts as token ids, from text, fill-in-the-middle pairs, chats, or files of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from eagle.errors import EagleError
from eagle.loading import EMBEDDED
from records.chat import apply_template, question
from records.fim import fragment
from records.quarantine import object_of
from records.rows import RowError
from records.sources import TEXTS, Record, kind_of, read_records, resolve
from records.tokens import encode, leading_ids

HELDOUT_PROMPTS = EMBEDDED / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    kind: str  # "text", "fim" or "chat"
    record: dict
    where: str = ""  # FILE:LINE


def text_prompt(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"a prompt is text, not {type(text).__name__}")
    return list(tokenizer(text, verbose=False).input_ids)


def fim_prompt(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Prefix-suffix-middle order, with the family's own tokens."""
    fim = find_fim_tokens(tokenizer)
    before = fragment(tokenizer, prefix, fim, glued=False)
    after = fragment(tokenizer, suffix, fim, glued=True)
    return [*leading_ids(tokenizer), fim.prefix, *before, fim.suffix, *after, fim.middle]


def chat_prompt(tokenizer: Any, messages: list[dict]) -> list[int]:
    if not tokenizer.chat_template:
        raise EagleError("this tokenizer has no chat template; give the prompt as plain text")
    try:
        text = apply_template(tokenizer, messages, add_generation_prompt=True)
    except RowError as error:
        raise EagleError(f"{error}; {error.remedy}") from error
    return encode(tokenizer, text)


def render(tokenizer: Any, record: dict) -> Prompt:
    """One record: {"prompt"}, {"prefix", "suffix"}, {"messages"}, {"instruction"}, or MT-Bench's
    and Spec-Bench's {"turns": [question, …]} (the first turn)."""
    if "prefix" in record and "suffix" in record:
        return Prompt(fim_prompt(tokenizer, record["prefix"], record["suffix"]), "fim", record)
    messages = record.get("messages")
    if messages is None and "turns" in record:
        messages = [{"role": "user", "content": record["turns"][0]}]
    if messages is None and "instruction" in record:
        text = question(record["instruction"], record.get("input") or "")
        messages = [{"role": "user", "content": text}]
    if messages is None:
        return Prompt(text_prompt(tokenizer, record["prompt"]), "text", record)
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise KeyError("messages")
    if not tokenizer.chat_template:
        return Prompt(text_prompt(tokenizer, messages[-1]["content"]), "text", record)
    return Prompt(chat_prompt(tokenizer, messages), "chat", record)


def load_prompts(path: str | Path | None, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """Records of any data file (records.sources), a .txt file being one prompt; None is the shipped
    held-out set. Raises EagleError that names the line when a record cannot be read."""
    files = [HELDOUT_PROMPTS] if path is None else resolve([path])
    records = itertools.chain.from_iterable(map(read_records, files))
    prompts = [_read_prompt(record, tokenizer) for record in itertools.islice(records, limit)]
    if not prompts:
        raise EagleError(f"{path} holds no prompt; one JSON record a line")
    return prompts


def _read_prompt(record: Record, tokenizer: Any) -> Prompt:
    where = f"{record.file}:{record.line}"
    try:
        value = object_of(record)
        if kind_of(Path(record.file)) in TEXTS:
            value = {"prompt": value["text"]}
        prompt = replace(render(tokenizer, value), where=where)
    except RowError as error:
        raise EagleError(f"{where} is no prompt: {error}; {error.remedy}") from error
    except (EagleError, ConfigError) as error:
        raise EagleError(f"{where} is no prompt: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        needed = "prompt, prefix and suffix, messages, instruction or turns"
        raise EagleError(f"{where} is no prompt; it needs {needed}") from error
    if not prompt.ids:
        raise EagleError(f"{where} is an empty prompt; remove it")
    return prompt
