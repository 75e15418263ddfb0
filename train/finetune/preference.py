"""Preferences -> pairs of rows that share a prompt.

    {prompt, chosen, rejected}                 text, or lists of messages
    {chosen: [messages], rejected: [messages]}  conversations that differ in the last message
    {query, retrieval_result: [...], chosen: {text}, rejected: {text}}

A pair whose answers are empty, equal, or too long is set aside: to cut an answer would change what
is preferred. Retrieved passages are cut, to the tokens that the question and the longer answer
leave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from configs.finetune_schema import PreferenceData
from records.chat import read_messages, render_chat, render_instruction, require_template
from records.render import record_key
from records.rows import Row, RowError
from records.tokens import encode_with_spans

SIDES = ("chosen", "rejected")
FORMS = (
    'write {"prompt": ..., "chosen": ..., "rejected": ...}, or query and retrieval_result with them'
)
EQUAL = ("chosen and rejected are equal", "remove the pair: it prefers nothing")
SLACK = 4  # tokens that may appear where a cut passage meets the text around it


class Pair(NamedTuple):
    """Two rows with the same tokens up to the answer."""

    chosen: Row
    rejected: Row
    key: int
    passages_cut: int = 0


def renderer(tokenizer: Any, cfg: PreferenceData) -> Callable[[dict], list[Pair]]:
    if cfg.template == "chat":
        require_template(tokenizer)
    return lambda record: [render_pair(record, tokenizer, cfg)]


def render_pair(record: dict, tokenizer: Any, cfg: PreferenceData) -> Pair:
    for side in SIDES:
        if record.get(side) is None:
            fields = f"fields: {', '.join(map(str, record))}"
            raise RowError(f"missing field '{side}'", FORMS, fields)
    retrieved = "retrieval_result" in record or "query" in record
    prompt, answers = (None, answers_of(record)) if retrieved else read_pair(record)
    for side, answer in zip(SIDES, answers, strict=True):
        if not answer.strip():
            raise RowError(f"{side} is empty", "remove the pair or fill it in")
    if answers[0].strip() == answers[1].strip():
        raise RowError(*EQUAL)
    cut = 0
    if retrieved:
        prompt, cut = retrieval(record, answers, tokenizer, cfg)
    rows = [render_answer(prompt, answer, tokenizer, cfg) for answer in answers]
    if any(row.truncated for row in rows):
        raise too_long("prompt and answer", cfg)
    if rows[0].input_ids == rows[1].input_ids:
        raise RowError(*EQUAL)
    return Pair(*rows, record_key(record), cut)


def read_pair(record: dict) -> tuple[str | list[dict], list[str]]:
    """(prompt as text or messages, the two answers)."""
    prompt, answers, shared = record.get("prompt"), [], []
    for side in (record["chosen"], record["rejected"]):
        if isinstance(side, list):
            *before, last = read_messages({"messages": side})
            if last["role"] != "assistant":
                raise RowError("a conversation does not end with the assistant", FORMS)
            answers.append(last["content"])
            shared.append(before)
        else:
            answers.append(text_of(side))
            shared.append([])
    if shared[0] != shared[1]:
        remedy = "let them differ in the last message only"
        raise RowError("chosen and rejected answer different prompts", remedy)
    if prompt is None and not shared[0]:
        raise RowError("missing field 'prompt'", FORMS)
    if isinstance(prompt, str) and prompt.strip():
        asked = [{"role": "user", "content": prompt}, *shared[0]]
        return asked if shared[0] else prompt, answers
    if not isinstance(prompt, (list, type(None))) or prompt == []:
        raise RowError("prompt is empty or not text", FORMS, f"it is {type(prompt).__name__}")
    return [*as_messages(prompt or []), *shared[0]], answers


def as_messages(prompt: list) -> list[dict]:
    """A list of messages, checked; it need not hold the assistant's."""
    if not prompt:
        return []
    *messages, _ = read_messages({"messages": [*prompt, {"role": "assistant", "content": "."}]})
    if messages[-1]["role"] == "assistant":
        raise RowError("the prompt does not end with the user", FORMS)
    return messages


def answers_of(record: dict) -> list[str]:
    return [text_of(record[side]) for side in SIDES]


def text_of(side: Any) -> str:
    """Text, or the `text` or `content` of an object."""
    if isinstance(side, dict):
        side = side.get("text", side.get("content"))
    if not isinstance(side, str):
        raise RowError("an answer is not text", FORMS, f"it is {type(side).__name__}")
    return side


def render_answer(
    prompt: str | list[dict], answer: str, tokenizer: Any, cfg: PreferenceData
) -> Row:
    """One row whose mask covers the answer alone, by the renderers of supervised data."""
    if isinstance(prompt, str):
        record = {"instruction": prompt, "output": answer}
        return render_instruction(record, tokenizer, cfg.max_length, template=cfg.template)
    require_template(tokenizer)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return render_chat({"messages": messages}, tokenizer, cfg.max_length, "last_assistant")


def too_long(what: str, cfg: PreferenceData) -> RowError:
    remedy = f"raise data.max_length={cfg.max_length}, or shorten them"
    return RowError(f"{what} are longer than data.max_length", remedy)


# retrieved passages


def retrieval(
    record: dict, answers: list[str], tokenizer: Any, cfg: PreferenceData
) -> tuple[str, int]:
    """(prompt with the passages that fit, passages that were cut)."""
    query, passages = record.get("query"), record.get("retrieval_result")
    if not isinstance(query, str) or not query.strip():
        raise RowError("query is empty or not text", FORMS)
    if not isinstance(passages, list) or not passages:
        raise RowError("retrieval_result is not a non-empty list", FORMS)
    passages = [text_of(passage).strip() for passage in passages]
    room = cfg.max_length - bare_length(query, len(passages), answers, tokenizer, cfg)
    if room < 0:
        raise too_long("question and answer", cfg)
    spans = [encode_with_spans(tokenizer, passage)[1] for passage in passages]
    kept = fair_shares([len(part) for part in spans], room)
    shown, cut = [], 0
    for text, part, tokens in zip(passages, spans, kept, strict=True):
        whole = tokens == len(part)
        shown.append(text if whole else text[: part[tokens - 1][1] if tokens else 0].rstrip())
        cut += not whole
    return question(query, shown), cut


def question(query: str, passages: list[str]) -> str:
    listed = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(passages, 1) if text)
    return f"Use the passages to answer the question.\n\n{listed}\n\nQuestion: {query}"


def bare_length(
    query: str, passages: int, answers: list[str], tokenizer: Any, cfg: PreferenceData
) -> int:
    """Tokens of everything but the passages, for the longer answer."""
    roomy = cfg.model_copy(update={"max_length": 10**9})
    prompt = question(query, ["."] * passages)
    rows = [render_answer(prompt, answer, tokenizer, roomy) for answer in answers]
    return max(len(row.input_ids) for row in rows) + SLACK * passages


def fair_shares(lengths: list[int], room: int) -> list[int]:
    """Tokens of each passage: all of the short ones, and the same for each that is cut."""
    kept = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    for place, n in enumerate(order):
        kept[n] = min(lengths[n], room // (len(order) - place))
        room -= kept[n]
    return kept
