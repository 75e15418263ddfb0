"""Chat and instruction records -> (ids, mask), supervising what the assistant writes.

Spans are proven, not guessed. The template is rendered with a marker in place of everything that a
row says: what does not come back is refused, so nothing is dropped in silence. Then, for each
assistant turn, with a marker in place of that turn alone: what precedes and follows the marker must
precede and follow the real turn, and what lies between is the assistant's, in the template's own
form: its text, its reasoning, its tool calls. A template that does anything else to a turn gets the
row refused with a reason."""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from eagle.errors import EagleError
from records.fields import Conversation, read_conversation
from records.rows import Row, RowError, cut_right, filled_field
from records.tokens import (
    added_tokens,
    control_tokens,
    encode,
    encode_with_spans,
    end_ids,
    leading_ids,
)

logger = logging.getLogger("records")
ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_THINK = re.compile(r"^(\s*<think>)?(.*?)(</think>\s*)(.*)$", re.DOTALL)
# tool calls as templates want them: are arguments JSON text, is the empty text beside them absent?
FORMS = ((False, False), (True, False), (False, True), (True, True))
REASONING, THOUGHT = "reasoning_content", "what stands before </think>"
ASKED = {"role": "user", "content": "question"}
PROBES = {
    REASONING: {"content": "answer", REASONING: "REASON"},
    THOUGHT: {"content": "<think>REASON</think>answer"},
}
Render = Callable[..., str]
KINDS = {"system": "a system message", "user": "a user's text", "tool": "a tool's result"}


def require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise EagleError(
            "chat data needs a tokenizer with a chat template: use an instruct model, put a "
            "chat_template.jinja beside its tokenizer, or use data.format=instruction (Alpaca)"
        )


def render_chat(record: dict, tokenizer: Any, max_length: int, supervise: str = "assistant") -> Row:
    """Render with the tokenizer's chat template; supervise assistant turns and their end tokens."""
    return render_conversation(read_conversation(record), tokenizer, max_length, supervise)


def render_conversation(
    found: Conversation, tokenizer: Any, max_length: int, supervise: str = "assistant"
) -> Row:
    text, turns = assistant_spans(found, tokenizer)
    learnt = [found.trained[n] for n in found.answers]
    if supervise == "last_assistant":
        learnt = [False] * (len(learnt) - 1) + learnt[-1:]
    if not any(learnt):
        raise RowError("no assistant turn is to be learnt", "give one a weight of 1")
    ids, spans = encode_with_spans(tokenizer, text)
    wanted = supervise != "all"  # which is all but what the row says is context
    marked = [turn for turn, on in zip(turns, learnt, strict=True) if on == wanted]
    mask = _mark(text, spans, marked)
    if not wanted:
        mask = [int(on > off) for on, off in zip(all_but_first(ids), mask, strict=True)]
    return cut_right(ids, mask, max_length)._replace(unused=tuple(sorted(found.unused)))


def render_instruction(
    record: dict, tokenizer: Any, max_length: int, supervise="assistant", template="auto"
) -> Row:
    """`instruction`, optional `input`, `response` or `output`; as a chat, or in Alpaca form."""
    found = read_conversation(record, "instruction")
    return render_as(found, tokenizer, max_length, supervise, template)


def render_as(
    found: Conversation, tokenizer: Any, max_length: int, supervise: str, template: str
) -> Row:
    """template: of the config; where it says so, the Alpaca form."""
    if as_chat(tokenizer, template):
        return render_conversation(found, tokenizer, max_length, supervise)
    prompt, response = alpaca_prompt(found), found.messages[-1]["content"]
    ids, spans = encode_with_spans(tokenizer, prompt + response)
    mask = _mark(prompt, spans, [(len(prompt), len(prompt) + len(response))])
    first, end = leading_ids(tokenizer), end_ids(tokenizer)
    ids, mask = first + ids + end, [0] * len(first) + mask + [1] * len(end)
    mask = all_but_first(ids) if supervise == "all" else mask
    return cut_right(ids, mask, max_length)._replace(unused=tuple(sorted(found.unused)))


def as_chat(tokenizer: Any | None, template: str) -> bool:
    """Are instructions chats? "auto": where the tokenizer has a chat template, or is not known."""
    has_template = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
    return template == "chat" or (template == "auto" and has_template)


def alpaca_prompt(found: Conversation) -> str:
    extras = [message for message in found.messages if message.keys() > {"role", "content"}]
    if found.parts is None or found.tools or extras or len(found.messages) > 2:
        raise RowError(
            "the Alpaca form has no place for a system prompt, a history, turns or tools",
            "use a tokenizer with a chat template (data.instruction_template=chat)",
        )
    instruction, context = found.parts
    given = f"### Input:\n{context}\n\n" if context.strip() else ""
    also = ", paired with an input that gives it context" if given else ""
    return ALPACA.format(also=also, instruction=instruction, input=given)


def all_but_first(ids: list[int]) -> list[int]:
    return [0] + [1] * (len(ids) - 1)


def assistant_spans(found: Conversation, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and the character span of each assistant turn in it, end token included."""
    marker = _marker(found)
    _require_no_special_tokens(found, tokenizer)
    marked = _marked(found, marker)
    render = _renderer(found, tokenizer, marked)
    ends = _ends(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    if results := [leaf for leaf, what in marked.leaves.items() if what == KINDS["tool"]]:
        skeleton = functools.partial(render, tools=marked.tools)
        text, turns = _turns(marked.messages, skeleton, marker, ends)
        if any(leaf in text[a:b] for leaf in results for a, b in turns):
            said = "the chat template writes a tool's result into the assistant's turn"
            raise RowError(said, "use another template, or pre-tokenise (data.format=tokenized)")
    return _turns(found.messages, render, marker, ends)


def chat_text(found: Conversation, tokenizer: Any) -> str:
    """The conversation as a prompt: up to where the assistant's next turn begins."""
    render = _renderer(found, tokenizer, _marked(found, _marker(found)))
    return render(found.messages, add_generation_prompt=True)


def apply_template(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        raise RowError(
            "the chat template refuses these messages",
            "bring the roles into the order and kinds that the model's template takes",
            " ".join(str(error).split())[:200],
        ) from error


def _marker(found: Conversation) -> str:
    text, marker = json.dumps([found.messages, found.tools], ensure_ascii=False), "MARKER"
    while marker in text:
        marker = f"M{marker}"
    return marker


def _renderer(found: Conversation, tokenizer: Any, marked: Marked) -> Render:
    """The template, with calls in the first of FORMS in which it shows all that the row says."""
    calls = any("tool_calls" in message for message in found.messages)
    refused = None
    for form in FORMS if calls else FORMS[:1]:

        def render(messages: list[dict], tools: Any = found.tools, form=form, **more: Any) -> str:
            given = [shaped(message, *form) for message in messages]
            return apply_template(tokenizer, given, tools=tools, **more)

        try:
            skeleton = render(marked.messages, marked.tools)
        except RowError as error:
            refused = refused or error
            continue
        missing = [what for leaf, what in marked.leaves.items() if leaf not in skeleton]
        missing = [what for what in missing if not _shows(render, PROBES.get(what))]
        wrong = ('\\"', "'x': '")  # not JSON but a text that holds it, or Python's form
        if any(f"{sign}{leaf}" in skeleton for sign in wrong for leaf in marked.leaves):
            missing.append("tool calls")
        if not missing:
            return render
        remedy = "use a chat template that has one, or remove such rows"
        refused = RowError(f"the chat template has no place for {missing[0]}", remedy)
    assert refused is not None
    raise refused


def _shows(render: Render, answer: dict | None) -> bool:
    """Does the template show this of a last turn? Of earlier ones it may leave out reasoning."""
    try:
        return answer is not None and "REASON" in render([ASKED, {"role": "assistant", **answer}])
    except RowError:
        return False


def shaped(message: dict, as_json: bool, absent: bool) -> dict:
    """A message as templates read it."""
    new = dict(message)
    if REASONING in message:
        new["thinking"] = message[REASONING]
    if calls := message.get("tool_calls"):
        new["content"] = message["content"] or (None if absent else "")
        new["tool_calls"] = calls = copy.deepcopy(calls)
        for function in (call["function"] for call in calls if as_json):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return new


class Marked(NamedTuple):
    """A conversation that says markers. leaves: what each of them stands for."""

    messages: list[dict]
    tools: list[dict] | None
    leaves: dict[str, str]


def _marked(found: Conversation, marker: str) -> Marked:
    (messages, tools), leaves = copy.deepcopy((found.messages, found.tools)), {}

    def leaf(what: str) -> str:
        leaves[name := f"{marker}{len(leaves)}END"] = what
        return name

    for message in messages:
        calls = message.get("tool_calls", ())
        if message["content"].strip():
            said = KINDS.get(message["role"], "the text beside a call" if calls else "an answer")
            frame = _parts(message["content"])[1] if message["role"] == "assistant" else [""]
            whats = [THOUGHT] * (len(frame) - 1) + [said]
            texts = (f + leaf(what) for f, what in zip(frame, whats, strict=True))
            message["content"] = "".join(texts)
        if REASONING in message:
            message[REASONING] = leaf(REASONING)
        for function in (call["function"] for call in calls):
            function["name"] = leaf("tool calls")
            if function["arguments"]:
                function["arguments"] = {"x": leaf("tool calls")}
    for tool in tools or ():
        tool["function"]["name"] = leaf("tools")
    return Marked(messages, tools, leaves)


def _parts(content: str) -> tuple[list[str], list[str]]:
    """[answer] or, for content with a `</think>`, [reasoning, answer]; and what precedes each."""
    found = _THINK.match(content)
    if found is None:
        return [content], [""]
    return [found[2], found[4]], [found[1] or "", found[3]]


def _turns(
    messages: list[dict], render: Render, marker: str, ends: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and the span in it of each assistant turn."""
    text, after, turns = render(messages), 0, []
    for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
        try:
            start, after = _span(messages, n, text, render, marker, ends)
        except RowError:
            # without its calls it may not stand before their results: look for what it is as the
            # last turn, with or without its reasoning
            start, bare = -1, {k: v for k, v in messages[n].items() if k != REASONING}
            for turn in (messages[n], bare) if "tool_calls" in bare else ():
                short = [*messages[:n], turn]
                alone = render(short)
                begin, end = _span(short, n, alone, render, marker, ends)
                if start < 0:
                    start = text.find(said := alone[begin:end].rstrip(), after)
            if start < 0:
                raise
            after = start + len(said)
        turns.append((start, after))
    return text, turns


def _span(
    messages: list[dict], n: int, text: str, render: Render, marker: str, ends: list[str]
) -> tuple[int, int]:
    """Where turn `n` stands, its end token included: what a marker in its place has before and
    behind it is the same in `text`."""
    parts, frame = _parts(messages[n]["content"])
    names = [f"{marker}T{p}END" for p in range(len(parts))]
    plain = {"role": "assistant", "content": "".join(map("".join, zip(frame, names, strict=True)))}
    if REASONING in messages[n]:
        parts, names = [messages[n][REASONING], *parts], [f"{marker}REND", *names]
        plain[REASONING] = names[0]
    swapped = render([*messages[:n], plain, *messages[n + 1 :]])
    if swapped.count(names[-1]) != 1:
        raise _rewritten(n, "drops or repeats it")
    head, _, tail = swapped.partition(names[-1])
    shown = [(part, name) for part, name in zip(parts, names, strict=True) if name in swapped]
    if len(shown) > 1:  # its reasoning too, and what opens that
        head = re.sub(r"<think>\s*$", "", head.partition(shown[0][1])[0])
    if not text.startswith(head):
        head = head.rstrip()
    if not text.startswith(head):  # a call may be headed in another way
        asked = render(messages[:n], add_generation_prompt=True)
        if not (text.startswith(asked) and head.startswith(asked)):
            raise _rewritten(n, "changes the text before it")
        head = asked
    own = _end_token(tail, ends)
    start, end = len(head), len(text) - len(tail) + len(own)
    if not text.endswith(tail):  # and ended by a token of its own
        if not (text.endswith(tail[len(own) :]) and text.endswith(tuple(ends[1:]), start, end)):
            raise _rewritten(n, "changes the text after it")
    if not all(part.strip() in text[start:end] for part, _ in shown):
        raise _rewritten(n, "rewrites its text")
    return start, end


def _end_token(tail: str, ends: list[str]) -> str:
    """The end token (and blanks before it) that follows an assistant's text, or nothing."""
    blanks = tail[: len(tail) - len(tail.lstrip(" \t"))]
    found = next((end for end in ends if end and tail.startswith(end, len(blanks))), "")
    return found and blanks + found


def _rewritten(n: int, what: str) -> RowError:
    return RowError(
        "the chat template rewrites an assistant turn, so its span cannot be located",
        "use a simpler chat template, or pre-tokenise the data (data.format=tokenized)",
        f"message {n}: the template {what}",
    )


def turn_end(tokenizer: Any) -> str:
    """The added tokens that the chat template puts right after a last answer, or nothing."""
    try:
        text = apply_template(tokenizer, [ASKED, {"role": "assistant", "content": "answer"}])
    except RowError:  # each row says so
        return ""
    tail, added, end = text.rpartition("answer")[2].lstrip(" \t"), added_tokens(tokenizer), ""
    while found := [token for token in added if tail.startswith(token, len(end))]:
        end += max(found, key=len)
    return end


@functools.lru_cache(maxsize=4)
def _ends(tokenizer: Any, template: str, size: int) -> list[str]:
    """What ends an answer as a rule, and all tokens that could, of this state of the tokenizer."""
    return [turn_end(tokenizer), *sorted(added_tokens(tokenizer), key=len, reverse=True)]


def warn_without_end(data_format: str, template: str, tokenizer: Any) -> None:
    """Of a template after whose answers nothing says that they are at an end."""
    template = {"chat": "chat", "instruction": template}.get(data_format, "")
    if as_chat(tokenizer, template) and not turn_end(tokenizer):
        logger.warning(
            "the chat template puts no special token after an answer: what is trained does not "
            "learn to stop; let it end answers with the model's end token"
        )


def _require_no_special_tokens(found: Conversation, tokenizer: Any) -> None:
    """They would be encoded as what they stand for: the end of a turn, a header."""
    text = json.dumps([found.messages, found.tools], ensure_ascii=False)
    if said := control_tokens(tokenizer, len(tokenizer)).search(text):
        remedy = "write it in another way, or remove the row"
        raise RowError("a text holds a special token of the tokenizer", remedy, said[0])


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
