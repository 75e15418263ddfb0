"""Preferences -> a prompt and two answers to it; and samples that were scored (by tests, by a judge,
by people) -> preferences.

    {prompt, chosen, rejected}                 text, or lists of messages
    {chosen: [messages], rejected: [messages]}  conversations that differ in the last message
    {query, retrieval_result: [...], chosen: {text}, rejected: {text}}

A pair whose answers are empty, equal, or too long is set aside: to cut an answer would change what
is preferred. Retrieved passages are cut, to the tokens that the question and the longer answer
leave.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, FiniteFloat, StringConstraints, ValidationError

from configs.finetune_schema import PreferenceData
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.chat import read_messages, render_chat, render_instruction, require_template
from records.render import record_key
from records.rows import Row, RowError
from records.sources import read_records, resolve
from records.tokens import encode_with_spans

SIDES = ("chosen", "rejected")
FORMS = (
    'write {"prompt": ..., "chosen": ..., "rejected": ...}, or query and retrieval_result with them'
)
SAMPLES = 'write {"prompt": ..., "samples": [{"text": ..., "score": 0.5}, ...]}, or one a line'


class Pair(NamedTuple):
    """Token ids of the prompt and of what follows it, to the end of the answer's turn."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    key: int
    passages_cut: int = 0


def render_pair(record: dict, tokenizer: Any, cfg: PreferenceData) -> Pair:
    if "retrieval_result" in record or "query" in record:
        answers = [text_of(record.get(side), side) for side in SIDES]
        prompt, cut = retrieval(record, answers, tokenizer, cfg)
    else:
        (prompt, answers), cut = read_pair(record), 0
    rows = [render_answer(prompt, answer, tokenizer, cfg) for answer in answers]
    if answers[0].strip() == answers[1].strip() or rows[0].input_ids == rows[1].input_ids:
        raise RowError("chosen and rejected are equal", "remove the pair: it prefers nothing")
    if max(len(row.input_ids) for row in rows) > cfg.max_length:
        raise too_long("prompt and answer", cfg)
    start = len(os.path.commonprefix([row.input_ids[: row.loss_mask.index(1)] for row in rows]))
    ends = [len(row.loss_mask) - row.loss_mask[::-1].index(1) for row in rows]
    sides = [row.input_ids[start:end] for row, end in zip(rows, ends, strict=True)]
    return Pair(rows[0].input_ids[:start], *sides, record_key(record), cut)


def read_pair(record: dict) -> tuple[str | list[dict], list[str]]:
    """(prompt as text or messages, the two answers)."""
    prompt, answers, before = record.get("prompt"), [], []
    for side in SIDES:
        given, shared = record.get(side), []
        if isinstance(given, list):
            *shared, given = read_messages({"messages": given})
            if given["role"] != "assistant":
                raise RowError("a conversation does not end with the assistant", FORMS)
        answers.append(text_of(given, side))
        before.append(shared)
    if before[0] != before[1]:
        remedy = "let them differ in the last message only"
        raise RowError("chosen and rejected answer different prompts", remedy)
    if prompt is None and not shared:
        raise RowError("missing field 'prompt'", FORMS)
    if isinstance(prompt, str) and prompt.strip():
        if not shared:
            return prompt, answers
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, type(None))) or prompt == []:
        raise RowError("prompt is empty or not text", FORMS, f"it is {type(prompt).__name__}")
    asked = [*(prompt or []), *shared, {"role": "assistant", "content": "."}]
    *messages, _ = read_messages({"messages": asked})  # checks them
    if messages[-1]["role"] == "assistant":
        raise RowError("the prompt does not end with the user", FORMS)
    return messages, answers


def text_of(value: Any, name: str) -> str:
    """Text, or the `text` or `content` of an object."""
    if isinstance(value, dict):
        value = value.get("text", value.get("content"))
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is missing, empty or not text", FORMS, f"it is {value!r}"[:80])
    return value


def render_answer(prompt: str | list, answer: str, tokenizer: Any, cfg: PreferenceData) -> Row:
    """One row, of any length, whose mask covers the answer alone."""
    if isinstance(prompt, str):
        record = {"instruction": prompt, "output": answer}
        return render_instruction(record, tokenizer, 10**9, template=cfg.template)
    require_template(tokenizer)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return render_chat({"messages": messages}, tokenizer, 10**9, "last_assistant")


def too_long(what: str, cfg: PreferenceData) -> RowError:
    remedy = f"raise data.max_length={cfg.max_length}, or shorten them"
    return RowError(f"{what} are longer than data.max_length", remedy)


def retrieval(record: dict, answers: list[str], tokenizer: Any, cfg: PreferenceData) -> tuple:
    """(prompt with the passages that fit, passages that were cut): the short ones whole, and as
    many tokens of each that is cut."""
    query, passages = text_of(record.get("query"), "query"), record.get("retrieval_result")
    if not isinstance(passages, list) or not passages:
        raise RowError("retrieval_result is not a non-empty list", FORMS)
    texts = [text_of(passage, "a passage").strip() for passage in passages]
    ends = [[end for _, end in encode_with_spans(tokenizer, text)[1]] for text in texts]
    most = max(map(len, ends))

    def asked(limit: int) -> str:
        shown = []
        for text, places in zip(texts, ends, strict=True):
            cut = limit < len(places)
            shown.append(text[: [0, *places][limit]].rstrip() if cut else text)
        listed = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(shown, 1) if text)
        return f"Use the passages to answer the question.\n\n{listed}\n\nQuestion: {query}"

    def exceeds(limit: int) -> bool:
        rows = (render_answer(asked(limit), answer, tokenizer, cfg) for answer in answers)
        return any(len(row.input_ids) > cfg.max_length for row in rows)

    limit = bisect_left(range(most), True, key=exceeds) - 1 if exceeds(most) else most
    if limit < 0:
        raise too_long("question and answer", cfg)
    return asked(limit), sum(len(e) > limit for e in ends)


class Sample(BaseModel):
    prompt: str | list
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    score: FiniteFloat


def build_pairs(data: str, output: str, margin: float = 0.0, per_prompt: int = 1) -> int:
    """Read scored samples, write {prompt, chosen, rejected, score_chosen, score_rejected}, say what
    was dropped."""
    if margin < 0 or per_prompt < 1:
        raise EagleError("--margin must be 0 or more and --per_prompt 1 or more")
    prompts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lines, ties, unusable = [], 0, 0
    for record in (r for path in resolve(data.split(",")) for r in read_records(path)):
        value = record.value or {}
        for given in value.get("samples") or [value]:
            try:
                sample = Sample.model_validate({"prompt": value.get("prompt"), **given})
                prompts[json.dumps(sample.prompt)][sample.text].append(sample.score)
            except (ValidationError, TypeError):
                unusable += 1
    for prompt, samples in prompts.items():
        # the same text with several scores counts once, with their mean
        ranked = sorted(((sum(s) / len(s), text) for text, s in samples.items()), reverse=True)
        before = len(lines)
        for n in range(min(per_prompt, len(ranked) // 2)):  # best and worst, the next two, …
            (high, chosen), (low, rejected) = ranked[n], ranked[-1 - n]
            if high - low > margin:
                line = {"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected}
                lines.append({**line, "score_chosen": high, "score_rejected": low})
        ties += len(lines) == before
    counts = f"{len(prompts)} prompts, {ties} prompts tied, {unusable} samples unusable"
    if not lines:
        raise EagleError(f"no preference in {data}: {counts}; {SAMPLES}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write_text(Path(output), text.encode("utf-8", "backslashreplace").decode())
    print(f"{len(lines)} pairs of {counts}: {output}")
    return 0
