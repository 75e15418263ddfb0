"""Preferences -> a prompt and two answers to it; and samples that were scored (by tests, by a judge,
by people) -> preferences.

    {prompt, chosen, rejected}                 text, or lists of messages, and what a chat has
    {chosen: [messages], rejected: [messages]}  conversations that differ in the last message
    {query, retrieval_result: [...], chosen: {text}, rejected: {text}}

The prompt may have any name and layout that rows have (`records.fields`), and the answers may
repeat it.

A pair whose answers are empty, equal, or too long is set aside: to cut an answer would change what
is preferred. Retrieved passages are cut, to the tokens that the question and the longer answer
leave.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, FiniteFloat, StringConstraints, ValidationError

from configs.finetune_schema import PreferenceData
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from records.chat import render_as
from records.fields import QUESTIONS, TEXT, TURNS, Conversation, Fields, read_conversation
from records.render import record_key
from records.rows import Row, RowError
from records.sources import read_records, resolve
from records.tokens import encode_with_spans

SIDES = {"chosen": ("chosen", "chosen_response"), "rejected": ("rejected", "rejected_response")}
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")  # a conversation in one text
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
    unused: tuple[str, ...] = ()

    @property
    def sequences(self) -> tuple[list[int], ...]:
        return self[:3]


def render_pair(record: dict, tokenizer: Any, cfg: PreferenceData) -> Pair:
    if "retrieval_result" in record:
        found, answers, cut = retrieval(record, tokenizer, cfg)
    else:
        (found, answers), cut = read_pair(record), 0
    rows = [render_answer(found, answer, tokenizer, cfg) for answer in answers]
    same = [{**answer, "content": answer["content"].strip()} for answer in answers]
    if same[0] == same[1] or rows[0].input_ids == rows[1].input_ids:
        raise RowError("chosen and rejected are equal", "remove the pair: it prefers nothing")
    if max(len(row.input_ids) for row in rows) > cfg.max_length:
        raise too_long("prompt and answer", cfg)
    start = len(os.path.commonprefix([row.input_ids[: row.loss_mask.index(1)] for row in rows]))
    ends = [len(row.loss_mask) - row.loss_mask[::-1].index(1) for row in rows]
    sides = [row.input_ids[start:end] for row, end in zip(rows, ends, strict=True)]
    return Pair(
        rows[0].input_ids[:start], *sides, record_key(record), cut, tuple(sorted(found.unused))
    )


def read_pair(record: dict) -> tuple[Conversation, list[dict]]:
    """What is asked, and the two answers to it."""
    row, found = Fields(record), Conversation()
    given = {side: row.take(names) for side, names in SIDES.items()}
    rest = {k: spoken(v) for k, v in row.value.items() if k not in row.taken}
    if not row.find((*TURNS, *QUESTIONS)):
        rest["messages"] = turns_of(given["chosen"], "chosen", None)[:-1]
    if row.find((*TURNS, *QUESTIONS)) or rest["messages"]:
        found = read_conversation(rest, "instruction", answered=False)
    asked, answers, unused = [], [], set(found.unused)
    for side, value in given.items():
        turns = turns_of(value, side, rest.get("prompt"))
        *shared, answer = (said := read_conversation({"messages": turns})).messages
        if answer["role"] != "assistant":
            raise RowError("a conversation does not end with the assistant", FORMS)
        if found.messages == said.messages:  # the chosen one, beside it once more
            found.messages.pop()
        asked.append(together(found.messages, shared))
        answers.append(answer)
        unused |= {name.replace("messages", side) for name in said.unused}
    if asked[0] != asked[1]:
        remedy = "let them differ in the last message only"
        raise RowError("chosen and rejected answer different prompts", remedy)
    if not asked[0]:
        raise RowError("missing field 'prompt'", FORMS)
    if asked[0][-1]["role"] == "assistant":
        raise RowError("the prompt does not end with the user", FORMS)
    alone = len(asked[0]) == 1 and (asked[0][0]["content"], "")
    parts = found.parts if asked[0] == found.messages and found.parts else alone or None
    return Conversation(asked[0], tools=found.tools, parts=parts, unused=unused), answers


def together(asked: list[dict], shared: list[dict]) -> list[dict]:
    """The prompt, and what stands before the answer: the same, more of it, or how it goes on."""
    if shared[: len(asked)] == asked:
        return shared
    if not shared or asked[-len(shared) :] == shared:
        return asked
    if asked[-1]["role"] == shared[0]["role"]:
        remedy = "let chosen and rejected differ in the last message only, and repeat the prompt"
        raise RowError("chosen and rejected answer different prompts", remedy)
    return asked + shared


def spoken(value: Any) -> Any:
    """Turns of a text like "Human: ... Assistant: ...", all else as it is."""
    if not isinstance(value, str) or not SPEAKER.match(value):
        return value
    _, *parts = SPEAKER.split(value)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": who.lower(), "content": text} for who, text in turns if text.strip()]


def turns_of(value: Any, side: str, prompt: Any) -> list:
    """A side as turns, which end with its answer."""
    if isinstance(value := spoken(value), list) and value:
        return value
    if isinstance(value, str) and isinstance(prompt, list):
        value = value.removeprefix(" ")
    elif isinstance(value, str) and isinstance(prompt, str) and prompt.strip():
        cut = value.removeprefix(prompt.rstrip())
        value = cut.lstrip() if len(cut) < len(value) else value
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        return [value]
    return [{"role": "assistant", "content": text_of(value, side)}]


def text_of(value: Any, name: str) -> str:
    """Text, or the text of an object."""
    if isinstance(value, dict):
        value = Fields(value).take(TEXT)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is missing, empty or not text", FORMS, f"it is {value!r}"[:80])
    return value


def render_answer(found: Conversation, answer: dict, tokenizer: Any, cfg: PreferenceData) -> Row:
    """One row, of any length, whose mask covers the answer alone."""
    messages = [*found.messages, answer]
    whole = replace(found, messages=messages, trained=[True] * len(messages))
    return render_as(whole, tokenizer, 10**9, "last_assistant", cfg.template)


def too_long(what: str, cfg: PreferenceData) -> RowError:
    remedy = f"raise data.max_length={cfg.max_length}, or shorten them"
    return RowError(f"{what} are longer than data.max_length", remedy)


def retrieval(record: dict, tokenizer: Any, cfg: PreferenceData) -> tuple:
    """(prompt with the passages that fit, the answers, passages that were cut): the short ones
    whole, and as many tokens of each that is cut."""
    row = Fields(record)
    query, passages = text_of(row.take(("query",)), "query"), row.take(("retrieval_result",))
    texts = [text_of(row.take(names), side) for side, names in SIDES.items()]
    answers = [{"role": "assistant", "content": text} for text in texts]
    if not isinstance(passages, list) or not passages:
        raise RowError("retrieval_result is not a non-empty list", FORMS)
    texts = [text_of(passage, "a passage").strip() for passage in passages]
    ends = [[end for _, end in encode_with_spans(tokenizer, text)[1]] for text in texts]
    most = max(map(len, ends))

    def asked(limit: int) -> Conversation:
        shown = []
        for text, places in zip(texts, ends, strict=True):
            cut = limit < len(places)
            shown.append(text[: [0, *places][limit]].rstrip() if cut else text)
        listed = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(shown, 1) if text)
        text = f"Use the passages to answer the question.\n\n{listed}\n\nQuestion: {query}"
        said = [{"role": "user", "content": text}]
        return Conversation(said, parts=(text, ""), unused=set(row.left()))

    def exceeds(limit: int) -> bool:
        rows = (render_answer(asked(limit), answer, tokenizer, cfg) for answer in answers)
        return any(len(row.input_ids) > cfg.max_length for row in rows)

    limit = bisect_left(range(most), True, key=exceeds) - 1 if exceeds(most) else most
    if limit < 0:
        raise too_long("question and answer", cfg)
    return asked(limit), answers, sum(len(e) > limit for e in ends)


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
