"""Chat and instruction records -> (ids, mask), supervising what the assistant writes.

Spans are proven, not guessed: the template is rendered twice, once with the real messages and once
with a marker in place of each assistant text. The text between the markers must reappear, piece by
piece and without remainder, in the real rendering; what lies between the pieces is the assistant's.
A template that does anything else to a turn gets the row refused with a reason."""

from __future__ import annotations

import re
from typing import Any

from eagle.errors import EagleError
from records.rows import Row, RowError, cut_right, fields_of, filled_field, text_field
from records.tokens import added_tokens, encode, encode_with_spans, end_ids, leading_ids

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant")
ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_FORMAT_HELP = 'write {"messages": [{"role": "user", "content": "..."}, ...]} in each row'
_THINK = re.compile(r"^(\s*<think>)?(.*?)(</think>\s*)(.*)$", re.DOTALL)


def require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise EagleError(
            "chat data needs a tokenizer with a chat template: use an instruct model, put a "
            "chat_template.jinja beside its tokenizer, or use data.format=instruction (Alpaca)"
        )


def read_messages(record: dict) -> list[dict[str, str]]:
    """`messages` (role, content) or ShareGPT `conversations` (from, value) -> clean messages."""
    turns = record.get("messages", record.get("conversations"))
    if turns is None:
        missing = "missing field 'messages' or 'conversations'"
        raise RowError(missing, _FORMAT_HELP, fields_of(record))
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError("messages is not a non-empty list", _FORMAT_HELP)
    messages = []
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowError("a message is not an object", _FORMAT_HELP, f"message {n}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        known = ROLES.get(str(role).lower())
        if known is None:
            remedy = f"use one of: {', '.join(ROLES)}"
            raise RowError("unknown role", remedy, f"message {n}: {role!r}")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise RowError("message content is not text", _FORMAT_HELP, f"message {n} is {kind}")
        if known == "assistant" and not content.strip():
            remedy = "remove the turn or fill it in"
            raise RowError("empty assistant message", remedy, f"message {n}")
        messages.append({"role": known, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no assistant message", "add the assistant's answer: it is what is learnt")
    return messages


def render_chat(record: dict, tokenizer: Any, max_length: int, supervise: str = "assistant") -> Row:
    """Render with the tokenizer's chat template; supervise assistant texts and their end tokens."""
    text, turns = assistant_spans(read_messages(record), tokenizer)
    turns = turns[-1:] if supervise == "last_assistant" else turns
    turns = [(start, end + _end_of_turn(tokenizer, text, end)) for start, end in turns]
    ids, spans = encode_with_spans(tokenizer, text)
    mask = all_but_first(ids) if supervise == "all" else _mark(text, spans, turns)
    return cut_right(ids, mask, max_length)


def render_instruction(
    record: dict, tokenizer: Any, max_length: int, supervise="assistant", template="auto"
) -> Row:
    """`instruction`, optional `input`, `response` or `output`; as a chat, or in Alpaca form."""
    instruction, context, response = read_instruction(record)
    if as_chat(tokenizer, template):
        messages = [
            {"role": "user", "content": question(instruction, context)},
            {"role": "assistant", "content": response},
        ]
        return render_chat({"messages": messages}, tokenizer, max_length, supervise)
    prompt = alpaca_prompt(instruction, context)
    ids, spans = encode_with_spans(tokenizer, prompt + response)
    mask = _mark(prompt, spans, [(len(prompt), len(prompt) + len(response))])
    first, end = leading_ids(tokenizer), end_ids(tokenizer)
    ids, mask = first + ids + end, [0] * len(first) + mask + [1] * len(end)
    return cut_right(ids, all_but_first(ids) if supervise == "all" else mask, max_length)


def read_instruction(record: dict) -> tuple[str, str, str]:
    """(instruction, input or "", response), checked."""
    remedy = 'write {"instruction": "...", "input": "", "output": "..."} in each row'
    answer = "response" if "response" in record else "output"
    instruction = filled_field(record, "instruction", remedy)
    if answer not in record:
        raise RowError("missing field 'response' or 'output'", remedy, fields_of(record))
    response = filled_field(record, answer, remedy)
    context = text_field({"input": record.get("input") or ""}, "input", remedy)
    return instruction, context, response


def as_chat(tokenizer: Any | None, template: str) -> bool:
    """Are instructions chats? "auto": where the tokenizer has a chat template, or is not known."""
    has_template = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
    return template == "chat" or (template == "auto" and has_template)


def question(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def alpaca_prompt(instruction: str, context: str) -> str:
    given = f"### Input:\n{context}\n\n" if context.strip() else ""
    also = ", paired with an input that gives it context" if given else ""
    return ALPACA.format(also=also, instruction=instruction, input=given)


def all_but_first(ids: list[int]) -> list[int]:
    return [0] + [1] * (len(ids) - 1)


def assistant_spans(
    messages: list[dict[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and the character span of each assistant text in it."""
    marked, texts, markers = list(messages), [], []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            parts, frame = _parts(message["content"])
            names = [_marker(messages, f"{n}x{p}") for p in range(len(parts))]
            content = "".join(map("".join, zip(frame, names, strict=True)))
            marked[n] = {"role": "assistant", "content": content}
            texts.append(parts)
            markers.append(names)
    text = apply_template(tokenizer, messages)
    return text, _match(text, apply_template(tokenizer, marked), texts, markers)


def apply_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RowError(
            "the chat template refuses these messages",
            "bring the roles into the order and kinds that the model's template takes",
            " ".join(str(error).split())[:200],
        ) from error


def _parts(content: str) -> tuple[list[str], list[str]]:
    """[answer] or, for content with a `</think>`, [reasoning, answer]; and what precedes each."""
    found = _THINK.match(content)
    if found is None:
        return [content], [""]
    return [found[2], found[4]], [found[1] or "", found[3]]


def _marker(messages: list[dict[str, str]], key: str) -> str:
    marker = f"MARKER{key}END"
    while any(marker in message["content"] for message in messages):
        marker = f"M{marker}"
    return marker


def _match(
    text: str, skeleton: str, texts: list[list[str]], markers: list[list[str]]
) -> list[tuple[int, int]]:
    """Walk `skeleton` and `text` together; every piece must agree. Returns the turns' spans."""
    position, rest, turns = 0, skeleton, []
    for n, (parts, names) in enumerate(zip(texts, markers, strict=True)):
        start = None
        for part, name in zip(parts, names, strict=True):
            if skeleton.count(name) != 1:
                if name == names[-1]:
                    raise _rewritten(n, "drops or repeats it")
                continue  # reasoning of an earlier turn, which templates leave out
            literal, found, rest = rest.partition(name)
            if not found:
                raise _rewritten(n, "moves it")
            if not text.startswith(literal, position):
                raise _rewritten(n, "changes the text before it")
            position += len(literal)
            if start is None:
                start = position - (_opened_think(literal) if name != names[-1] else 0)
            following = _until_marker(rest, markers)
            position += _content_length(text, position, part, following, n)
        assert start is not None
        turns.append((start, position))
    if text[position:] != rest:
        raise _rewritten(len(texts) - 1, "changes the text after it")
    return turns


def _until_marker(rest: str, markers: list[list[str]]) -> str:
    """Literal text up to the next marker."""
    ends = [rest.find(name) for names in markers for name in names]
    return rest[: min([end for end in ends if end >= 0], default=len(rest))]


def _content_length(text: str, position: int, part: str, following: str, n: int) -> int:
    """Length of `part`, as written or stripped, where `following` comes right after it."""
    variants = (part, part.strip(), part.rstrip(), part.lstrip(), part.strip("\n"))
    for variant in variants + (part.lstrip("\n"), part.rstrip("\n")):
        end = position + len(variant)
        if text.startswith(variant, position) and text.startswith(following, end):
            return len(variant)
    raise _rewritten(n, "rewrites its text")


def _opened_think(literal: str) -> int:
    """Length of a `<think>` and white space that end the literal before a reasoning text."""
    found = re.search(r"<think>\s*$", literal)
    return len(found[0]) if found else 0


def _rewritten(n: int, what: str) -> RowError:
    return RowError(
        "the chat template rewrites an assistant turn, so its span cannot be located",
        "use a simpler chat template, or pre-tokenise the data (data.format=tokenized)",
        f"assistant turn {n}: the template {what}",
    )


def _end_of_turn(tokenizer: Any, text: str, end: int) -> int:
    """Length of the end token (and blanks before it) that follows an assistant text, or 0."""
    blanks = len(text) - end - len(text[end:].lstrip(" \t"))
    candidates = [t for t in added_tokens(tokenizer) if text.startswith(t, end + blanks)]
    return blanks + max(map(len, candidates)) if candidates else 0


def _mark(text: str, spans: list[tuple[int, int]], turns: list[tuple[int, int]]) -> list[int]:
    """1 for tokens that lie wholly inside a turn, blanks glued to its first word included.

    `: Hello` often splits into `:` and ` Hello`, and the model writes the blank with the word. Any
    other token that straddles the start (a header's newline and the text's own) was prompt."""
    reach = [(len(text[:left].rstrip(" \t")), left, right) for left, right in turns]
    return [
        int(n > 0 and end > start and any(start >= a and b < end <= c for a, b, c in reach))
        for n, (start, end) in enumerate(spans)
    ]


def encode_plain(record: dict, tokenizer: Any, max_length: int) -> Row:
    """`text` rows: every token but the first is a target; the end token closes the document."""
    field = "content" if "content" in record and "text" not in record else "text"
    text = filled_field(record, field, 'write {"text": "..."} in each row')
    ids = leading_ids(tokenizer) + encode(tokenizer, text) + end_ids(tokenizer)
    return cut_right(ids, all_but_first(ids), max_length)
