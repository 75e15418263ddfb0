"""The fields of a row: what people call them, what they mean, and which mean nothing for training.

`read_conversation` turns a row of any layout into one form: messages, tools, and which answers are
learnt. What it takes is used. The rest is inert by its name (ids, sources, scores), or is named in
`unused`: nothing is dropped in silence."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from typing import Any

from records.rows import RowError, fields_of, filled_field, text_field

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
ANSWERS = ("response", "output", "completion", "answer", "answers", "solution")
CONTEXTS = ("input", "context")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
REJECTED = {"label", "kto_tag", "desirable"}  # of one-sided preferences: true or false
ROLE, TEXT = ("role", "from", "speaker"), ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "train", "loss", "train_on_turn")
ROLES = dict.fromkeys(("system", "developer", "system_prompt"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai"), "assistant")
CALLING = ("function_call", "tool_call", "function-call")  # roles of a turn that is a call as JSON
ROLES |= dict.fromkeys(CALLING, "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
ROLES |= dict.fromkeys(("function_response", "tool_response", "function-response"), "tool")
OTHERS = {  # fields of the formats that are no conversations: the first group that a record has
    "fim": [("prefix", "middle", "suffix"), ("text",), ("content",), ("code",)],
    "plain": [("text",), ("content",)],
    "tokenized": [("input_ids", "loss_mask", "labels", "attention_mask")],
}
INERT = re.compile(
    r"(^|_|-)((uu)?ids?|idx|index|hash|sha\d*|md5|scores?|ratings?|sources?|origin|urls?|counts?|"
    r"len|length|date|time|timestamp|created(_at)?|lang|language|version|license|models?|path|file|"
    r"filename|repo|repository|split|subset|dataset|metadata|meta|tags?|topics?|category|"
    r"subcategory|domain|difficulty|quality|margin|generator|author)$"
    r"|^(num|n|meta|metadata|score)_|^(task|kind|type|size|ext|redacted|toxic|annotations|name|"
    r"parallel_tool_calls|tool_call_id|stars?)$"
)
FORMAT_HELP = 'write {"messages": [{"role": "user", "content": "..."}, ...]} in each row'
INSTRUCTION_HELP = 'write {"instruction": "...", "input": "", "output": "..."} in each row'
CALL_HELP = 'write {"tool_calls": [{"function": {"name": "...", "arguments": {...}}}]}'


def is_inert(name: str) -> bool:
    return name != "input_ids" and bool(INERT.search(str(name).lower()))


class Fields:
    """An object whose fields are taken one by one; null is absent."""

    def __init__(self, value: dict) -> None:
        self.value = {k: v for k, v in value.items() if v is not None}
        self.taken: set[str] = set()

    def find(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self.value), None)

    def take(self, names: tuple[str, ...], default: Any = None) -> Any:
        """The first of `names` that there is."""
        name = self.find(names)
        self.taken.add(name)
        return self.value.get(name, default)

    def left(self) -> dict[str, Any]:
        """What was not taken, is not inert, and holds something."""
        left = {k: v for k, v in self.value.items() if k not in self.taken and not is_inert(k)}
        return {k: v for k, v in left.items() if v not in ("", [], {})}


def unused_fields(record: dict, data_format: str) -> tuple[str, ...]:
    """Of a record of a format that is no conversation."""
    row = Fields(record)
    row.taken |= set(next((names for names in OTHERS[data_format] if row.find(names)), ()))
    return tuple(row.left())


@dataclass
class Conversation:
    """messages: {role, content} with `tool_calls`, `reasoning_content`, `tool_call_id`, `name`
    where they have them; roles are system, user, assistant, tool. trained: False for an assistant
    turn that is context. places: the field of the row that a message came from, and its place
    there. parts: instruction and context, where the row is one. unused: names of fields."""

    messages: list[dict] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    places: list[tuple[str, int | None]] = field(default_factory=list)
    tools: list[dict] | None = None
    parts: tuple[str, str] | None = None
    unused: set[str] = field(default_factory=set)

    def add(self, message: dict, trained: bool, *place: Any, at: int = 10**9) -> None:
        self.messages.insert(at, message)
        self.trained.insert(at, trained)
        self.places.insert(at, place)

    @property
    def answers(self) -> list[int]:
        return [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversation(record: dict, wanted: str = "chat", answered: bool = True) -> Conversation:
    """wanted: "chat" or "instruction", the layout that error messages ask for. answered: False
    where a row may end with the question. Raises RowError."""
    row, found = Fields(record), Conversation()
    for name in row.value.keys() & REJECTED:
        liked = row.value[name]
        if liked is False or (liked == 0 and "completion" in row.value):
            remedy = "remove such rows: they show what not to say"
            raise RowError(f"a rejected answer ({name}: false)", remedy)
        row.taken |= {name} if liked is True else set()
    found.tools = read_tools(row.take(TOOLS))
    system = as_text(row.take(SYSTEM, ""), "system")
    if history := read_history(row.take(("history",), [])):
        read_turns(found, history, "history")
    turns, asked = row.find(TURNS), row.find(QUESTIONS)
    if turns is not None:
        read_turns(found, row.take(TURNS), turns)
    elif asked is not None and (row.find(ANSWERS) or not answered or wanted != "chat"):
        read_question(found, row, asked, answered)
    elif wanted == "chat":
        missing = "missing field 'messages' or 'conversations'"
        raise RowError(missing, FORMAT_HELP, fields_of(record))
    else:
        raise RowError("missing field 'instruction'", INSTRUCTION_HELP, fields_of(record))
    if answered and not found.answers:
        raise RowError("no assistant message", "add the assistant's answer: it is what is learnt")
    said = {message["content"].strip() for message in found.messages}
    if system.strip() and (system.strip() not in said or found.messages[0]["role"] != "system"):
        if found.messages[0]["role"] == "system":
            raise RowError("'system' and the first message differ", "leave one system prompt")
        found.add({"role": "system", "content": system}, True, "system", None, at=0)
    left = row.left().items()
    found.unused |= {k for k, v in left if not (isinstance(v, str) and v.strip() in said)}
    return found


def read_turns(found: Conversation, turns: Any, name: str) -> None:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(f"{name} is not a non-empty list", FORMAT_HELP)
    for place, turn in enumerate(turns):
        read_turn(found, turn, name, place)


def read_question(found: Conversation, row: Fields, name: str, answered: bool) -> None:
    """A question and its answer, each text or a list of turns, or calls as the answer."""
    asked, answer = row.take(QUESTIONS), row.find(ANSWERS)
    if isinstance(asked, list):
        read_turns(found, asked, name)
    else:
        context = row.take(CONTEXTS) or ""
        context = "\n\n".join(context) if is_list_of(str, context) else context
        asked = filled_field({name: asked}, name, FORMAT_HELP)
        parts = (asked, as_text(context, row.find(CONTEXTS) or ""))
        found.parts = None if found.messages else parts
        found.add({"role": "user", "content": question(*parts)}, True, name, None)
    said = row.take(ANSWERS)
    if answer is None:
        if answered:
            missing = "missing field 'response' or 'output'"
            raise RowError(missing, INSTRUCTION_HELP, fields_of(row.value))
        return
    if isinstance(said, dict) and is_list_of(str, said.get("text")):
        said = said["text"][0]  # as SQuAD has it: several ways to say the same
    if answer == "answers" and found.tools:  # calls of them
        read_turn(found, {"role": "assistant", "tool_calls": said}, answer, None)
    elif isinstance(said, list):
        read_turns(found, said, answer)
    else:
        message = {
            "role": "assistant",
            "content": filled_field({answer: said}, answer, FORMAT_HELP),
        }
        found.add(message, True, answer, None)


def question(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def read_history(history: Any) -> list[Any]:
    """Pairs [question, answer], or turns."""
    turns, roles = [], ("user", "assistant")
    for given in history if isinstance(history, list) else [history]:
        if isinstance(given, (list, tuple)) and len(given) == 2:
            turns += [{"role": r, "content": text} for r, text in zip(roles, given, strict=True)]
        else:
            turns.append(given)
    return turns


def read_turn(found: Conversation, given: Any, name: str, place: int | None) -> None:
    """Append one turn to `found`."""
    where = f"message {len(found.messages) if place is None else place}"
    if not isinstance(given, dict):
        raise RowError("a message is not an object", FORMAT_HELP, where)
    turn = Fields(given)
    given_role = turn.take(ROLE)
    role = ROLES.get(str(given_role).lower())
    if role is None:
        remedy = f"use one of: {', '.join(ROLES)}"
        raise RowError("unknown role", remedy, f"{where}: {given_role!r}")
    content, reasoning = read_content(turn.take(TEXT), role, where)
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        calls = [turn.take((key,)) for key in ("tool_calls", "function_call")]
        if str(given_role).lower() in CALLING:
            calls, message["content"] = [content], ""
        if calls := [call for given in calls for call in read_calls(given, where)]:
            message["tool_calls"] = calls
        if as_text(reasoning := turn.take(REASONING) or reasoning, "reasoning_content").strip():
            message["reasoning_content"] = reasoning
        if not message["content"].strip() and not calls:
            raise RowError("empty assistant message", "remove the turn or fill it in", where)
    elif role == "tool":
        message |= {k: turn.take((k,)) for k in ("name", "tool_call_id") if k in turn.value}
    flag = read_flag(turn, where)
    if flag and role != "assistant":
        found.unused |= {f"{name}[].{key}" for key in FLAGS if turn.value.get(key)}
    found.unused |= {f"{name}[].{key}" for key in turn.left()}
    found.add(paired(found.messages, message), flag is not False, name, place)


def read_content(content: Any, role: str, where: str) -> tuple[str, str]:
    """(text, reasoning) of text, a list of parts, or nothing beside a call."""
    if content in (None, []) and role == "assistant":
        return "", ""
    if not is_list_of(dict, content) or not all(p.keys() & {"type", "text"} for p in content):
        if role == "tool" and isinstance(content, (dict, list)):
            return json.dumps(content, ensure_ascii=False), ""
        if not isinstance(content, str):
            kind = type(content).__name__
            raise RowError("message content is not text", FORMAT_HELP, f"{where} is {kind}")
        return content, ""
    said: dict[bool, list[str]] = {True: [], False: []}
    for part in content:
        kind = part.get("type", "text")
        if kind not in ("thinking", "reasoning", "text", "input_text", "output_text"):
            remedy = "only text can be trained on: remove the row, or the part"
            raise RowError(f"a content part of type {kind!r}", remedy, where)
        said["text" in kind].append(as_text(part.get(kind, part.get("text")), f"a {kind} part"))
    return "".join(said[True]), "\n".join(said[False])


def read_flag(turn: Fields, where: str) -> bool | None:
    """Is the turn learnt? None where nothing is said."""
    said = {key: turn.take((key,)) for key in FLAGS if key in turn.value}
    for key, value in said.items():
        if value not in (0, 1):  # also true and false
            remedy = "a turn is learnt (1) or is context (0)"
            raise RowError(f"a turn's {key} is neither 0 nor 1", remedy, f"{where}: {value!r}")
    return all(said.values()) if said else None


def read_calls(given: Any, where: str) -> list[dict]:
    """Calls in the form {"type": "function", "function": {"name", "arguments": {…}}}."""
    calls = []
    for call, function in functions(given, "a tool call", CALL_HELP, where):
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = from_json(arguments, "a tool call's arguments", where)
        if not isinstance(arguments, dict):
            raise RowError("a tool call's arguments are no JSON object", CALL_HELP, where)
        made = {"name": function["name"], "arguments": arguments}
        id_ = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", "function": made, **id_})
    return calls


def paired(before: list[dict], message: dict) -> dict:
    """Calls have an id, by which templates pair them with their results; results have the id and
    the name of the call that they answer: that of the same place where the row does not say."""
    calls = [call for m in before for call in m.get("tool_calls", ())]
    for n, call in enumerate(message.get("tool_calls", ()), len(calls)):
        call.setdefault("id", f"call{n:05}")
    if message["role"] == "tool" and calls:
        usual = calls[min(sum(m["role"] == "tool" for m in before), len(calls) - 1)]
        call = next((c for c in calls if c["id"] == message.get("tool_call_id")), usual)
        message = {"tool_call_id": call["id"], "name": call["function"]["name"], **message}
    return message


def read_tools(given: Any) -> list[dict] | None:
    """Definitions in the form {"type": "function", "function": {…}}."""
    remedy = 'write "tools": [{"type": "function", "function": {"name": "...", ...}}]'
    tools = functions(given, "a tool", remedy, "")
    return [t if t is not f else {"type": "function", "function": f} for t, f in tools] or None


def functions(given: Any, what: str, remedy: str, where: str) -> list[tuple[dict, dict]]:
    """Objects, and the function of each, which has a name: one or a list of them, or as JSON."""
    given = from_json(given, what, where) or []
    found = []
    for item in given if isinstance(given, list) else [given]:
        item = from_json(item, what, where)
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has no name", remedy, f"{where} {item!r}"[:80].strip())
        found.append((item, function))
    return found


def from_json(value: Any, what: str, where: str) -> Any:
    """Text is parsed, all else is as it is."""
    try:
        return json.loads(value or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        detail = f"{where} {str(error)[:80]}".strip()
        raise RowError(f"no JSON in {what}", "write it as a JSON object", detail) from error


def as_text(value: Any, name: str) -> str:
    return text_field({name: value}, name, FORMAT_HELP)


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def rewritten(record: dict, found: Conversation, answers: dict[int, str | None]) -> dict:
    """The record with other answers: {number of the message: text}. Of a turn that is replaced its
    role, its text and its flags stay; None makes it context instead."""
    places = found.places
    if any(name == "history" for name, _ in places):  # whose pairs have no place for a flag
        record = {k: v for k, v in record.items() if is_inert(k) or k in TOOLS}
        record["messages"] = found.messages
        places = [("messages", n) for n in range(len(places))]
    new = copy.deepcopy(record)
    for n, text in answers.items():
        name, place = places[n]
        if place is None:
            new[name] = text
        elif text is None:
            new[name][place]["weight"] = 0
        else:
            turn = new[name][place]
            kept = {k: v for k, v in turn.items() if k in (*ROLE, *FLAGS)}
            new[name][place] = {**kept, Fields(turn).find(TEXT) or "content": text}
    return new
