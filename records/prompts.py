"""Prompts as token ids, from text, fill-in-the-middle pairs, chats, or files of them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from eagle.errors import EagleError
from eagle.loading import EMBEDDED
from records.chat import chat_text
from records.fields import ANSWERS, QUESTIONS, TURNS, Conversation, Fields, read_conversation
from records.fim import render_fim
from records.quarantine import name_unused, object_of
from records.rows import RowError
from records.sources import TEXTS, Record, kind_of, read_records, resolve
from records.tokens import encode

HELDOUT_PROMPTS = EMBEDDED / "data" / "prompts.jsonl"
UNLIMITED = 1 << 40  # tokens
# what data for training or evaluation has beside its prompts
NOT_PROMPTS = "middle canonical_solution test tests entry_point reference target chosen rejected"
NEEDED = "prompt, prefix and suffix, messages, instruction, question, text or turns"


@dataclass(frozen=True)
class Prompt:
    """unused: fields of the record that were not used."""

    ids: list[int]
    kind: str  # "text", "fim" or "chat"
    record: dict
    where: str = ""  # FILE:LINE
    unused: tuple[str, ...] = ()


def text_prompt(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"a prompt is text, not {type(text).__name__}")
    return list(tokenizer(text, verbose=False).input_ids)


def fim_prompt(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """What training puts before a middle, in prefix-suffix-middle order."""
    if not isinstance(prefix, str) or not isinstance(suffix, str):
        raise TypeError("prefix and suffix are text")
    tokens = find_fim_tokens(tokenizer)
    row = render_fim((prefix, "middle", suffix), tokenizer, tokens, UNLIMITED)
    return row.input_ids[: row.loss_mask.index(1)]


def chat_prompt(tokenizer: Any, messages: list[dict]) -> list[int]:
    return _conversation_prompt(tokenizer, read({"messages": messages}))


def read(record: dict) -> Conversation:
    """The conversation that a record asks to go on: without an answer at its end."""
    found = read_conversation(record, "instruction", answered=False)
    while found.messages and found.messages[-1]["role"] == "assistant":
        found.messages.pop()
    if not found.messages:
        raise RowError("an answer without a question", "put the user's turn before it")
    return found


def _conversation_prompt(tokenizer: Any, found: Conversation) -> list[int]:
    if not tokenizer.chat_template:
        raise EagleError("this tokenizer has no chat template; give the prompt as plain text")
    try:
        return encode(tokenizer, chat_text(found, tokenizer))
    except RowError as error:
        raise EagleError(f"{error}; {error.remedy}") from error


def render(tokenizer: Any, record: dict) -> Prompt:
    """One record: {"prompt"}, {"prefix" or "prompt", "suffix"}, {"messages"}, {"instruction"},
    {"text"} and what they are called elsewhere, or MT-Bench's and Spec-Bench's {"turns": [question,
    …]} (the first turn)."""
    row = Fields(record)
    row.taken |= {*ANSWERS, *NOT_PROMPTS.split()}
    if "suffix" in row.value and (name := row.find(("prefix", "prompt"))):
        ids = fim_prompt(tokenizer, row.take((name,)), row.take(("suffix",)))
        return Prompt(ids, "fim", record, unused=tuple(row.left()))
    plain = "prompt" if isinstance(record.get("prompt"), str) else row.find(("text", "content"))
    asked = row.find((*TURNS, "turns", "instruction"))
    if asked is None and (plain == "prompt" or not row.find(QUESTIONS)):
        ids = text_prompt(tokenizer, row.take((plain,)) if plain else record["prompt"])
        return Prompt(ids, "text", record, unused=tuple(row.left()))
    if asked == "turns":
        row.taken.add("turns")
        found = read({"messages": [{"role": "user", "content": record["turns"][0]}]})
    else:
        found = read(record)
    unused = tuple(name for name in found.unused if name in row.left() or "[]" in name)
    if tokenizer.chat_template:
        return Prompt(_conversation_prompt(tokenizer, found), "chat", record, unused=unused)
    if len(found.messages) > 1 or found.tools:
        raise EagleError("this tokenizer has no chat template; give the prompt as plain text")
    return Prompt(text_prompt(tokenizer, found.messages[0]["content"]), "text", record)


def load_prompts(path: str | Path | None, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """Records of any data file (records.sources), a .txt file being one prompt; None is the shipped
    held-out set. Raises EagleError that names the line when a record cannot be read."""
    files = [HELDOUT_PROMPTS] if path is None else resolve([path])
    records = itertools.chain.from_iterable(map(read_records, files))
    prompts = [_read_prompt(record, tokenizer) for record in itertools.islice(records, limit)]
    if not prompts:
        raise EagleError(f"{path} holds no prompt; one JSON record a line")
    unused = Counter(name for prompt in prompts for name in prompt.unused)
    name_unused(unused, path or HELDOUT_PROMPTS, "a prompt")
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
        raise EagleError(f"{where} is no prompt; it needs {NEEDED}") from error
    if not prompt.ids:
        raise EagleError(f"{where} is an empty prompt; remove it")
    return prompt
