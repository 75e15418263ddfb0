"""Records whose answers are to be written anew: what is asked for each, and the record with the
answers. A prompt is what training puts before the answer: the same template, the same FIM tokens.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from eagle.errors import EagleError
from records.chat import (
    alpaca_prompt,
    apply_template,
    as_chat,
    assistant_spans,
    question,
    read_instruction,
    read_messages,
    require_template,
)
from records.fim import FILE_FIELDS, read_fim, render_fim, spans_of
from records.render import make_renderer, record_key
from records.rows import RowError
from records.tokens import added_tokens, encode, leading_ids

FORMATS = ("chat", "instruction", "fim", "tokenized")
UNLIMITED = 1 << 20  # tokens: an answer is not judged by data.max_length here


def require_answers(cfg: DataConfig) -> None:
    if cfg.format not in FORMATS:
        raise EagleError(
            f"data.format={cfg.format} has no answers to write: use {', '.join(FORMATS)}"
        )


@dataclass(frozen=True)
class Ask:
    """A prompt: `ids` (None without a tokenizer) and, where it is a chat, `messages`. `opened`:
    what ends the prompt and belongs to the answer, a `<think>` of the template's."""

    ids: list[int] | None
    messages: list[dict] | None = None
    opened: str = ""


@dataclass(frozen=True)
class Answer:
    """text without end tokens; ids as generated, None from an endpoint; `cut`: max_new_tokens ended
    it; error: why there is none."""

    text: str = ""
    ids: list[int] | None = None
    tokens: int = 0
    cut: bool = False
    error: str | None = None


Steps = Generator[Ask, Answer, dict]  # asks, is sent the answers, and returns the record with them


class Task:
    """A record, or a span of one, in work: `ask` is what it waits for, None at its end, when it has
    either a `record` or an `error`."""

    def __init__(self, steps: Steps, kept: int = 0, may_be_blank: bool = False) -> None:
        self.steps, self.kept, self.may_be_blank = steps, kept, may_be_blank
        self.answers: list[Answer] = []
        self.record: dict | None = None
        self.error: RowError | None = None
        self._advance(lambda: next(self.steps))

    def take(self, answer: Answer) -> None:
        if answer.error is not None:
            self._fail(RowError(answer.error, "repair the record or remove it"))
        elif not (answer.text.strip() or self.may_be_blank):
            self._fail(RowError("the answer is empty", "remove the record, or ask it another way"))
        else:
            self.answers.append(answer)
            self._advance(lambda: self.steps.send(answer))

    def _advance(self, step: Callable[[], Ask]) -> None:
        try:
            self.ask: Ask | None = step()
        except StopIteration as end:
            self.ask, self.record = None, end.value
        except RowError as error:
            self._fail(error)

    def _fail(self, error: RowError) -> None:
        self.ask, self.error = None, error


class Rewriter:
    """From records of a format to tasks, and the proof that a result can be trained on.

    tokenizer: the target's; None for an endpoint that is asked with messages, which needs none.
    eos: the target's own end tokens; `ends` are these and what ends an answer of this format.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Any | None, eos: frozenset[int] = frozenset()
    ) -> None:
        require_answers(cfg)
        self.cfg, self.tokenizer, self.ends = cfg, tokenizer, frozenset(eos)
        self.as_chat = cfg.format == "chat" or (
            cfg.format == "instruction" and as_chat(tokenizer, cfg.instruction_template)
        )
        self._render = None
        if tokenizer is None:
            if not self.as_chat:
                raise EagleError(
                    f"{cfg.format} prompts need the target's tokenizer: give --base FOLDER_OR_ID"
                )
            return
        wide = cfg.model_copy(update={"max_length": UNLIMITED, "supervise": "assistant"})
        self._render = make_renderer(cfg.format, wide, tokenizer)
        if self.as_chat:
            require_template(tokenizer)
            self.ends |= frozenset(_turn_end(tokenizer))
        elif cfg.format == "fim":
            self.fim = find_fim_tokens(tokenizer, cfg.fim_tokens)
            self.ends |= frozenset(self.fim[:4])

    def tasks(self, record: dict) -> list[Task]:
        """Raises RowError for a record that is not of the format. A whole file (FIM) makes several
        tasks.
        """
        return getattr(self, f"_{self.cfg.format}")(record)

    def check(self, task: Task) -> bool | None:
        """Can the result be trained on (else RowError), and does it read back as the tokens that
        were generated? None where that is not known."""
        if task.error is not None:
            raise task.error
        if self._render is None:
            return None
        (row,) = self._render(task.record)
        if task.kept or any(answer.ids is None for answer in task.answers):
            return None
        supervised = [i for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
        written = [i for answer in task.answers for i in answer.ids or []]
        return _without(supervised, self.ends) == _without(written, self.ends)

    def _chat(self, record: dict) -> list[Task]:
        messages = read_messages(record)
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        asked = [n for n in turns if any(m["role"] == "user" for m in messages[:n])]
        if not asked:
            raise RowError("no assistant turn follows a user's", "remove the record")

        def steps() -> Steps:
            new = copy.deepcopy(record)
            written = new["messages" if "messages" in new else "conversations"]
            for n in asked:
                answer = yield self._ask(messages[:n])
                messages[n] = {**messages[n], "content": answer.text}
                written[n]["content" if "content" in written[n] else "value"] = answer.text
            return new

        return [Task(steps(), kept=len(turns) - len(asked))]

    def _instruction(self, record: dict) -> list[Task]:
        instruction, context, _ = read_instruction(record)
        if self.as_chat:
            ask = self._ask([{"role": "user", "content": question(instruction, context)}])
        else:
            text = alpaca_prompt(instruction, context)
            ask = Ask(leading_ids(self.tokenizer) + encode(self.tokenizer, text))

        def steps() -> Steps:
            answer = yield ask
            return {**record, "response" if "response" in record else "output": answer.text}

        return [Task(steps())]

    def _fim(self, record: dict) -> list[Task]:
        found = read_fim(record)
        rng = random.Random(f"{self.cfg.seed}:{record_key(found)}")  # cuts a file as training does
        rest = record
        if isinstance(found, str):
            rest = {k: v for k, v in record.items() if k not in FILE_FIELDS}

        def steps(span: tuple[str, str, str], prompt: list[int]) -> Steps:
            answer = yield Ask(prompt)
            return {**rest, "prefix": span[0], "middle": answer.text, "suffix": span[2]}

        tasks = []
        for span in spans_of(found, self.cfg.fim_spans_per_file, rng):
            spm = rng.random() < self.cfg.fim_spm_rate
            row = render_fim(span, self.tokenizer, self.fim, self.cfg.max_length, spm)
            tasks.append(Task(steps(span, row.input_ids[: row.loss_mask.index(1)])))
        return tasks

    def _tokenized(self, record: dict) -> list[Task]:
        """`input_ids` up to the first supervised token, all of them where nothing is, are the
        prompt.
        """
        ids = record.get("input_ids")
        marks = record.get("loss_mask") or [int(i != -100) for i in record.get("labels") or []]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise RowError("'input_ids' is not a list of token ids", 'write {"input_ids": [...]}')
        prompt = ids[: marks.index(1)] if 1 in marks else ids

        def steps() -> Steps:
            new = (yield Ask(prompt)).ids or []
            kept = {k: v for k, v in record.items() if k not in ("labels", "loss_mask")}
            mask = [0] * len(prompt) + [1] * len(new)
            return {**kept, "input_ids": prompt + new, "loss_mask": mask}

        return [Task(steps(), may_be_blank=True)]

    def _ask(self, messages: list[dict]) -> Ask:
        if self.tokenizer is None:
            return Ask(None, messages)
        text = apply_template(self.tokenizer, messages, add_generation_prompt=True)
        opened = re.search(r"<think>\s*$", text)
        return Ask(encode(self.tokenizer, text), messages, opened[0] if opened else "")


def _turn_end(tokenizer: Any) -> list[int]:
    """The token that the chat template puts after an assistant's text, if it is one of the added
    ones.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text, turns = assistant_spans(messages, tokenizer)
    after = text[turns[-1][1] :].lstrip(" \t")
    found = [t for t in added_tokens(tokenizer) if after.startswith(t)]
    return [tokenizer.convert_tokens_to_ids(max(found, key=len))] if found else []


def _without(ids: list[int], ends: frozenset[int]) -> list[int]:
    return [i for i in ids if i not in ends]
