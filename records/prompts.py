"""Prompts as token ids, from text, fill-in-the-middle pairs, chats, or files of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from eagle.errors import EagleError
from eagle.loading import EMBEDDED
from records.chat import apply_template, question
from records.rows import RowError
from records.tokens import encode

HELDOUT_PROMPTS = EMBEDDED / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    kind: str  # "text", "fim" or "chat"
    record: dict


def text_prompt(tokenizer: Any, text: str, **options: Any) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"a prompt is text, not {type(text).__name__}")
    return list(tokenizer(text, verbose=False, **options).input_ids)


def fim_prompt(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Prefix-suffix-middle order, with the family's own tokens."""
    fim = find_fim_tokens(tokenizer)
    before, after = (text_prompt(tokenizer, x, add_special_tokens=False) for x in (prefix, suffix))
    return [fim.prefix, *before, fim.suffix, *after, fim.middle]


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
    """A JSONL file of records, or a text file with one prompt in all; None is the shipped held-out
    set. Raises EagleError that names the line when a record cannot be read."""
    path = Path(path) if path is not None else HELDOUT_PROMPTS
    if not path.is_file():
        raise EagleError(f"no prompt file {path}; give a .jsonl file of prompts, or a .txt file")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EagleError(f"cannot read {path}: {error}; prompts are UTF-8 text") from error
    if path.suffix == ".txt":
        if not text:
            raise EagleError(f"{path} is empty; a .txt file is one prompt")
        return [Prompt(text_prompt(tokenizer, text), "text", {"prompt": text})]
    lines = enumerate(text.split("\n"), 1)  # splitlines() would cut at U+2028 inside a string
    filled = [(line, f"{path}:{number}") for number, line in lines if line.strip()][:limit]
    prompts = [_read_prompt(line, where, tokenizer) for line, where in filled]
    if not prompts:
        raise EagleError(f"{path} holds no prompt; one JSON record a line")
    return prompts


def _read_prompt(line: str, where: str, tokenizer: Any) -> Prompt:
    try:
        prompt = render(tokenizer, json.loads(line))
    except json.JSONDecodeError as error:
        raise EagleError(f"{where} is not JSON ({error.msg}); one record a line") from error
    except (EagleError, ConfigError) as error:
        raise EagleError(f"{where} is no prompt: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        needed = "prompt, prefix and suffix, messages, instruction or turns"
        raise EagleError(f"{where} is no prompt; it needs {needed}") from error
    if not prompt.ids:
        raise EagleError(f"{where} is an empty prompt; remove it")
    return prompt
