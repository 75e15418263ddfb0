"""Records whose answers are to be written anew: what is asked for each, and the record with the
answers. A prompt is what training puts before the answer: the same template, the same FIM tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from eagle.errors import EagleError
from records.chat import alpaca_prompt, as_chat, chat_text, require_template, shaped, turn_end
from records.fields import Conversation, read_conversation, rewritten
from records.fim import FILE_FIELDS, read_fim, render_fim, spans_of
from records.render import make_renderer, record_key
from records.rows import RowError
from records.sources import Record
from records.tokens import encode, leading_ids

UNLIMITED = 1 << 20  # tokens: an answer is not judged by data.max_length here


@dataclass(frozen=True)
class Ask:
    """A prompt: `ids` (None without a tokenizer) and, where it is a chat, `messages` and `tools` as
    a server takes them. `opened`: what ends the prompt and belongs to the answer, a `<think>` of
    the template's."""

    ids: list[int] | None
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    opened: str = ""
    may_be_blank: bool = False


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


@dataclass
class Task:
    """Record number `number`, or span `part` of it, in work: `ask` is what it waits for, None at
    its end, when it is either `written` or has an `error`."""

    record: Record
    number: int
    part: int
    steps: Steps
    answers: list[Answer] = field(default_factory=list)
    ask: Ask | None = None
    written: dict | None = None
    error: RowError | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Of the answer that it waits for."""
        return self.number, self.part, len(self.answers)

    def take(self, answer: Answer | None) -> None:
        """On to the next ask; answer: None at the begin."""
        try:
            if answer is not None:
                if answer.error is not None:
                    raise RowError(answer.error, "repair the record or remove it")
                if not (answer.text.strip() or self.ask.may_be_blank):
                    remedy = "remove the record, or ask it another way"
                    raise RowError("the answer is empty", remedy)
                self.answers.append(answer)
            self.ask = self.steps.send(answer)
        except StopIteration as end:
            self.ask, self.written = None, end.value
        except RowError as error:
            self.ask, self.error = None, error


class Rewriter:
    """From records of a format to what is asked for them, and the proof that a result can be
    trained on.

    tokenizer: the target's; None for an endpoint that is asked with messages, which needs none.
    eos: the target's own end tokens; `ends` are these and what ends an answer of this format.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Any | None, eos: frozenset[int] = frozenset()
    ) -> None:
        self.cfg, self.tokenizer, self.ends = cfg, tokenizer, frozenset(eos)
        self.as_chat = cfg.format == "chat" or (
            cfg.format == "instruction" and as_chat(tokenizer, cfg.instruction_template)
        )
        if tokenizer is None and not self.as_chat:
            raise EagleError(
                f"{cfg.format} prompts need the target's tokenizer: give --base FOLDER_OR_ID"
            )
        if tokenizer is None:
            return
        wide = cfg.model_copy(update={"max_length": UNLIMITED, "supervise": "assistant"})
        self._render = make_renderer(cfg.format, wide, tokenizer)
        if self.as_chat:
            require_template(tokenizer)
            self.ends |= frozenset(encode(tokenizer, turn_end(tokenizer))[:1])
        elif cfg.format == "fim":
            self.fim = find_fim_tokens(tokenizer, cfg.fim_tokens)
            self.ends |= frozenset(self.fim[:4])

    def steps(self, record: dict) -> list[Steps]:
        """Raises RowError for a record that is not of the format. A whole file (FIM) is several."""
        if self.cfg.format in ("chat", "instruction"):
            return self._conversation(record)
        return getattr(self, f"_{self.cfg.format}")(record)

    def check(self, task: Task) -> None:
        """Can the result be trained on? Else RowError."""
        if task.error is not None:
            raise task.error
        if self.tokenizer is not None:
            self._render(task.written)

    def _conversation(self, record: dict) -> list[Steps]:
        """Each text that the assistant answered a user with. A call stays, as context: it was not
        this target that made it, and what follows is the answer to it."""
        found = read_conversation(record, self.cfg.format)
        messages = found.messages
        roles = [message["role"] for message in messages]
        calls = [n for n in found.answers if "tool_calls" in messages[n]]
        turns = [n for n in found.answers if "user" in roles[:n] and found.trained[n]]
        if not (turns := [n for n in turns if n not in calls]):
            raise RowError("no assistant's text follows a user's turn", "remove the record")

        def steps() -> Steps:
            new: dict[int, str | None] = dict.fromkeys(calls)
            for n in turns:
                new[n] = (yield self._ask(found, n)).text
                messages[n] = {"role": "assistant", "content": new[n]}
            return rewritten(record, found, new)

        return [steps()]

    def _fim(self, record: dict) -> list[Steps]:
        found = read_fim(record)
        rng = random.Random(f"{self.cfg.seed}:{record_key(found)}")  # cuts a file as training does
        rest = record
        if isinstance(found, str):
            rest = {k: v for k, v in record.items() if k not in FILE_FIELDS}

        def steps(span: tuple[str, str, str], prompt: list[int]) -> Steps:
            answer = yield Ask(prompt)
            return {**rest, "prefix": span[0], "middle": answer.text, "suffix": span[2]}

        all_steps = []
        for span in spans_of(found, self.cfg.fim_spans_per_file, rng):
            spm = rng.random() < self.cfg.fim_spm_rate
            row = render_fim(span, self.tokenizer, self.fim, self.cfg.max_length, spm)
            all_steps.append(steps(span, row.input_ids[: row.loss_mask.index(1)]))
        return all_steps

    def _tokenized(self, record: dict) -> list[Steps]:
        """`input_ids` up to the first supervised token, all of them where nothing is, are the
        prompt."""
        ids = record.get("input_ids")
        marks = record.get("loss_mask") or [int(i != -100) for i in record.get("labels") or []]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise RowError("'input_ids' is not a list of token ids", 'write {"input_ids": [...]}')
        prompt = ids[: marks.index(1)] if 1 in marks else ids

        def steps() -> Steps:
            new = (yield Ask(prompt, may_be_blank=True)).ids or []
            kept = {k: v for k, v in record.items() if k not in ("labels", "loss_mask")}
            mask = [0] * len(prompt) + [1] * len(new)
            return {**kept, "input_ids": prompt + new, "loss_mask": mask}

        return [steps()]

    def _ask(self, found: Conversation, n: int) -> Ask:
        """What is asked for message `n`."""
        before = Conversation(found.messages[:n], tools=found.tools)
        if not self.as_chat:
            text = alpaca_prompt(found)
            return Ask(leading_ids(self.tokenizer) + encode(self.tokenizer, text))
        messages = [shaped(message, True, True) for message in before.messages]
        if self.tokenizer is None:
            return Ask(None, messages, found.tools)
        text = chat_text(before, self.tokenizer)
        opened = re.search(r"<think>\s*$", text)
        ids = encode(self.tokenizer, text)
        return Ask(ids, messages, found.tools, opened[0] if opened else "")
