"""Records whose answers are to be written anew: what is asked for each, and the record with the
answers.

Knows formats, tokenizers and prompts; knows nothing of who answers or of files. A prompt is what
  training
puts before the answer: the same template, the same FIM tokens.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from eagle.errors import EagleError
from records.chat import ALPACA, assistant_spans, read_instruction, read_messages, require_template
from records.fim import cut_spans, read_fim, render_fim
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
    it;
    error: why there is none."""

    text: str = ""
    ids: list[int] | None = None
    tokens: int = 0
    cut: bool = False
    error: str | None = None


@dataclass
class Task:
    """One record in work: `next()` says what to ask, `take()` is given the answer, `result()` is
    the record.
    """

    asks: int
    make_ask: Callable[[list[Answer]], Ask]
    make_record: Callable[[list[Answer]], dict]
    kept: int = 0  # assistant turns that nobody asked for stay as they are
    may_be_blank: bool = False
    answers: list[Answer] = field(default_factory=list)
    failure: tuple[str, str] | None = None  # reason and remedy

    @property
    def unfinished(self) -> bool:
        return self.failure is None and len(self.answers) < self.asks

    def next(self) -> Ask | None:
        return self.make_ask(self.answers) if self.unfinished else None

    def take(self, answer: Answer) -> None:
        if answer.error is not None:
            self.failure = answer.error, "repair the record or remove it"
        elif not (answer.text.strip() or self.may_be_blank):
            self.failure = "the answer is empty", "remove the record, or ask it another way"
        else:
            self.answers.append(answer)

    def result(self) -> dict:
        assert len(self.answers) == self.asks and self.failure is None
        return self.make_record(self.answers)


class Rewriter:
    """From records of a format to tasks, and the proof that a result can be trained on.

    tokenizer: the target's; None for an endpoint that is asked with messages, which needs none.
    eos: the target's own end tokens; `ends` are these and what ends an answer of this format.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Any | None, eos: frozenset[int] = frozenset()
    ) -> None:
        require_answers(cfg)
        self.cfg, self.tokenizer = cfg, tokenizer
        self.as_chat = cfg.format == "chat"
        self.ends = frozenset(eos)
        self._render = None
        if cfg.format == "instruction":
            template = cfg.instruction_template
            self.as_chat = (
                template == "chat"
                or template == "auto"
                and (tokenizer is None or bool(getattr(tokenizer, "chat_template", None)))
            )
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
        if self._render is None:
            return None
        (row,) = self._render(task.result())
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

        def so_far(answers: list[Answer]) -> list[dict]:
            written = dict(zip(asked, answers, strict=False))
            return [
                {**m, "content": written[n].text} if n in written else m
                for n, m in enumerate(messages)
            ]

        def result(answers: list[Answer]) -> dict:
            new = copy.deepcopy(record)
            turns = new["messages" if "messages" in new else "conversations"]
            for n, answer in zip(asked, answers, strict=True):
                turns[n]["content" if "content" in turns[n] else "value"] = answer.text
            return new

        def ask(answers: list[Answer]) -> Ask:
            return self._ask(so_far(answers)[: asked[len(answers)]])

        return [Task(len(asked), ask, result, kept=len(turns) - len(asked))]

    def _instruction(self, record: dict) -> list[Task]:
        instruction, context, _ = read_instruction(record)
        field = "response" if "response" in record else "output"
        if self.as_chat:
            question = f"{instruction}\n\n{context}" if context.strip() else instruction
            ask = self._ask([{"role": "user", "content": question}])
        else:
            text = ALPACA.format(
                also=", paired with an input that gives it context" if context.strip() else "",
                instruction=instruction,
                input=f"### Input:\n{context}\n\n" if context.strip() else "",
            )
            ask = Ask(leading_ids(self.tokenizer) + encode(self.tokenizer, text))
        return [Task(1, lambda _: ask, lambda answers: {**record, field: answers[0].text})]

    def _fim(self, record: dict) -> list[Task]:
        found = read_fim(record)
        rng = random.Random(f"{self.cfg.seed}:{record_key(found)}")  # cuts a file as training does
        whole_file = isinstance(found, str)
        spans = cut_spans(found, self.cfg.fim_spans_per_file, rng) if whole_file else [found]
        rest = {k: v for k, v in record.items() if k not in ("text", "content", "code")}
        return [self._fim_task(rest if whole_file else record, span, rng) for span in spans]

    def _fim_task(self, record: dict, span: tuple[str, str, str], rng: random.Random) -> Task:
        spm = rng.random() < self.cfg.fim_spm_rate
        row = render_fim(span, self.tokenizer, self.fim, self.cfg.max_length, spm)
        ask = Ask(row.input_ids[: row.loss_mask.index(1)])

        def result(answers: list[Answer]) -> dict:
            return {**record, "prefix": span[0], "middle": answers[0].text, "suffix": span[2]}

        return Task(1, lambda _: ask, result)

    def _tokenized(self, record: dict) -> list[Task]:
        """`input_ids` up to the first supervised token, all of them where nothing is, are the
        prompt.
        """
        ids = record.get("input_ids")
        marks = record.get("loss_mask") or [int(i != -100) for i in record.get("labels") or []]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise RowError("'input_ids' is not a list of token ids", 'write {"input_ids": [...]}')
        prompt = ids[: marks.index(1)] if 1 in marks else ids

        def result(answers: list[Answer]) -> dict:
            new = answers[0].ids
            kept = {k: v for k, v in record.items() if k not in ("labels", "loss_mask")}
            return {
                **kept,
                "input_ids": prompt + new,
                "loss_mask": [0] * len(prompt) + [1] * len(new),
            }

        return [Task(1, lambda _: Ask(prompt), result, may_be_blank=True)]

    def _ask(self, messages: list[dict]) -> Ask:
        if self.tokenizer is None:
            return Ask(None, messages)
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RowError(
                "the chat template refuses these messages", "repair the turns", str(error)[:200]
            ) from error
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
