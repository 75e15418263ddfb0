"""Preferences -> pairs of rows that share a prompt.

    {prompt, chosen, rejected}                 text, or lists of messages
    {chosen: [messages], rejected: [messages]}  conversations that differ in the last message
    {query, retrieval_result: [...], chosen: {text}, rejected: {text}}

A pair whose answers are empty, equal, or too long is set aside: to cut an answer would change what
is preferred. Retrieved passages are cut, to the tokens that the question and the longer answer
leave.

Knows tokenizers; knows nothing of models or batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from configs.finetune_schema import PreferenceData
from records.chat import read_messages, render_chat, render_instruction, require_template
from records.quarantine import each_record
from records.render import record_key
from records.rows import Row, RowError
from records.tokens import encode_with_spans, require_fast

FORMS = (
    'write {"prompt": ..., "chosen": ..., "rejected": ...}, or query and retrieval_result with them'
)
SLACK = 4  # tokens that may appear where a cut passage meets the text around it


class Pair(NamedTuple):
    """Two rows with the same tokens up to the answer."""

    chosen: Row
    rejected: Row
    key: int
    passages_cut: int = 0


def load_pairs(
    cfg: PreferenceData, tokenizer: Any, files: list[Path], out: Path | None
) -> tuple[list[Pair], dict]:
    """The pairs of `files`, and what was counted; bad records as everywhere."""
    require_fast(tokenizer)
    if cfg.template == "chat":
        require_template(tokenizer)
    pairs: list[Pair] = []
    card = each_record(
        files, cfg, out, lambda record: pairs.append(render_pair(record, tokenizer, cfg))
    )
    card |= {"rows": len(pairs), "passages_cut": sum(pair.passages_cut for pair in pairs)}
    return pairs, card


def render_pair(record: dict, tokenizer: Any, cfg: PreferenceData) -> Pair:
    for side in ("chosen", "rejected"):
        if record.get(side) is None:
            raise RowError(
                f"missing field '{side}'", FORMS, f"fields: {', '.join(map(str, record))}"
            )
    cut = 0
    if "retrieval_result" in record or "query" in record:
        prompt, answers, cut = retrieval(record, tokenizer, cfg)
    else:
        prompt, answers = read_pair(record)
    require_answers(answers)
    rows = [render_answer(prompt, answer, tokenizer, cfg) for answer in answers]
    if any(row.truncated for row in rows):
        raise RowError(
            "prompt and answer are longer than data.max_length",
            f"raise data.max_length={cfg.max_length}, or shorten them",
        )
    if rows[0].input_ids == rows[1].input_ids:
        raise RowError("chosen and rejected are equal", "remove the pair: it prefers nothing")
    return Pair(rows[0], rows[1], record_key(record), cut)


def read_pair(record: dict) -> tuple[str | list[dict], tuple[str, str]]:
    """(prompt as text or messages, the two answers)."""
    prompt, sides = record.get("prompt"), [record["chosen"], record["rejected"]]
    answers, shared = [], []
    for side in sides:
        if isinstance(side, list):
            messages = read_messages({"messages": side})
            if messages[-1]["role"] != "assistant":
                raise RowError("a conversation does not end with the assistant", FORMS)
            answers.append(messages[-1]["content"])
            shared.append(messages[:-1])
        else:
            answers.append(text_of(side))
            shared.append([])
    if shared[0] != shared[1]:
        raise RowError(
            "chosen and rejected answer different prompts",
            "let them differ in the last message only",
        )
    if isinstance(prompt, list):
        return [*as_messages(prompt), *shared[0]], (answers[0], answers[1])
    if prompt is None:
        if not shared[0]:
            raise RowError("missing field 'prompt'", FORMS)
        return shared[0], (answers[0], answers[1])
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError("prompt is empty or not text", FORMS, f"it is {type(prompt).__name__}")
    if shared[0]:
        return [{"role": "user", "content": prompt}, *shared[0]], (answers[0], answers[1])
    return prompt, (answers[0], answers[1])


def as_messages(prompt: list) -> list[dict]:
    """A list of messages, checked; it need not hold the assistant's."""
    closing = {"role": "assistant", "content": "."}
    messages = read_messages({"messages": [*prompt, closing]})[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise RowError("the prompt does not end with the user", FORMS)
    return messages


def text_of(side: Any) -> str:
    """Text, or the `text` or `content` of an object."""
    if isinstance(side, dict):
        side = side.get("text", side.get("content"))
    if not isinstance(side, str):
        raise RowError("an answer is not text", FORMS, f"it is {type(side).__name__}")
    return side


def require_answers(answers: tuple[str, str]) -> None:
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise RowError(f"{name} is empty", "remove the pair or fill it in")
    if answers[0].strip() == answers[1].strip():
        raise RowError("chosen and rejected are equal", "remove the pair: it prefers nothing")


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


# retrieved passages


def retrieval(
    record: dict, tokenizer: Any, cfg: PreferenceData
) -> tuple[str, tuple[str, str], int]:
    """(prompt with the passages that fit, the two answers, passages that were cut)."""
    query, passages = record.get("query"), record.get("retrieval_result")
    if not isinstance(query, str) or not query.strip():
        raise RowError("query is empty or not text", FORMS)
    if not isinstance(passages, list) or not passages:
        raise RowError("retrieval_result is not a non-empty list", FORMS)
    passages = [text_of(passage).strip() for passage in passages]
    answers = (text_of(record["chosen"]), text_of(record["rejected"]))
    require_answers(answers)
    lengths = [len(encode_with_spans(tokenizer, p)[0]) for p in passages]
    room = cfg.max_length - bare_length(query, passages, answers, tokenizer, cfg)
    if room < 0:
        raise RowError(
            "question and answer are longer than data.max_length",
            f"raise data.max_length={cfg.max_length}, or shorten them",
        )
    kept = fair_shares(lengths, room)
    shown = [
        cut(p, n, tokenizer) if n < have else p
        for p, n, have in zip(passages, kept, lengths, strict=True)
    ]
    count = sum(n < have for n, have in zip(kept, lengths, strict=True))
    return question(query, shown), answers, count


def question(query: str, passages: list[str]) -> str:
    listed = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(passages, 1) if text)
    return f"Use the passages to answer the question.\n\n{listed}\n\nQuestion: {query}"


def bare_length(
    query: str, passages: list[str], answers: tuple[str, str], tokenizer: Any, cfg: PreferenceData
) -> int:
    """Tokens of everything but the passages, for the longer answer."""
    roomy = cfg.model_copy(update={"max_length": 10**9})
    marks = question(query, ["." for _ in passages])
    rows = [render_answer(marks, answer, tokenizer, roomy) for answer in answers]
    return max(len(row.input_ids) for row in rows) + SLACK * len(passages)


def fair_shares(lengths: list[int], room: int) -> list[int]:
    """Tokens of each passage: all of the short ones, and the same for each of those that are
    cut.
    """
    kept = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    for place, n in enumerate(order):
        kept[n] = min(lengths[n], room // (len(order) - place))
        room -= kept[n]
    return kept


def cut(text: str, tokens: int, tokenizer: Any) -> str:
    """The first `tokens` tokens of a text, as text."""
    if tokens <= 0:
        return ""
    _, spans = encode_with_spans(tokenizer, text)
    return text[: spans[tokens - 1][1]].rstrip()
