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

from records.rows import RowError, fields_of

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
ANSWERS = ("response", "output", "completion", "answer", "answers", "solution")
CONTEXTS = ("input", "context")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
REJECTED = ("label", "kto_tag", "desirable")  # of one-sided preferences: true or false
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
OTHERS = {  # fields of the formats that are no conversations
    "fim": ("prefix", "middle", "suffix"),
    "plain": ("text",),
    "tokenized": ("input_ids", "loss_mask", "labels", "attention_mask"),
}
FILE_FIELDS = {"fim": ("text", "content", "code"), "plain": ("text", "content")}
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

    def take(self, names: tuple[str, ...]) -> Any:
        """The first of `names` that there is."""
        name = self.find(names)
        self.taken.add(name)
        return self.value.get(name)

    def left(self) -> dict[str, Any]:
        """What was not taken, is not inert, and holds something."""
        left = {k: v for k, v in self.value.items() if k not in self.taken and not is_inert(k)}
        return {k: v for k, v in left.items() if v not in ("", [], {})}


def unused_fields(record: dict, data_format: str) -> tuple[str, ...]:
    """Of a record of a format that is no conversation."""
    fields, used = Fields(record), OTHERS[data_format]
    if data_format in FILE_FIELDS and not (data_format == "fim" and fields.find(used)):
        used = (fields.find(FILE_FIELDS[data_format]) or "",)
    fields.taken |= set(used)
    return tuple(fields.left())


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
    unused: tuple[str, ...] = ()

    def add(self, role: str, text: str, name: str) -> None:
        self.messages.append({"role": role, "content": text})
        self.trained.append(True)
        self.places.append((name, None))

    @property
    def answers(self) -> list[int]:
        return [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversation(record: dict, wanted: str = "chat", answered: bool = True) -> Conversation:
    """wanted: "chat" or "instruction", the layout that error messages ask for. answered: False
    where a row may end with the question. Raises RowError."""
    row, found = Fields(record), Conversation()
    for name in REJECTED:
        if row.value.get(name) is False or (row.value.get(name) == 0 and "completion" in row.value):
            remedy = "remove such rows: they show what not to say"
            raise RowError(f"a rejected answer ({name}: false)", remedy)
        row.taken |= {name} if isinstance(row.value.get(name), bool) else set()
    found.tools = read_tools(row.take(TOOLS))
    system, unused = row.take(SYSTEM), set()
    if system is not None and as_text(system, "system").strip():
        found.add("system", as_text(system, "system"), "system")
    for turn in read_history(row.take(("history",))):
        read_turn(found, turn, "history", None, unused)
    turns, question = row.find(TURNS), row.find(QUESTIONS)
    if turns is not None:
        read_turns(found, row.take(TURNS), turns, unused)
    elif question is not None and (row.find(ANSWERS) or not answered or wanted != "chat"):
        read_question(found, row, question, answered, unused)
    elif wanted == "chat":
        missing = "missing field 'messages' or 'conversations'"
        raise RowError(missing, FORMAT_HELP, fields_of(record))
    else:
        raise RowError("missing field 'instruction'", INSTRUCTION_HELP, fields_of(record))
    if answered and not found.answers:
        raise RowError("no assistant message", "add the assistant's answer: it is what is learnt")
    systems = [m["content"].strip() for m in found.messages if m["role"] == "system"]
    if (
        found.places[0][0] == "system"
        and len(systems) > 1
        and found.messages[1]["role"] == "system"
    ):
        if systems[0] != systems[1]:
            remedy = "leave one of them"
            raise RowError("'system' and the first message are two system prompts", remedy)
        for values in (found.messages, found.trained, found.places):
            del values[0]
    told = {message["content"].strip() for message in found.messages}
    unused |= {k for k, v in row.left().items() if not (isinstance(v, str) and v.strip() in told)}
    found.unused = tuple(sorted(unused))
    return found


def read_turns(found: Conversation, turns: Any, name: str, unused: set[str]) -> None:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(f"{name} is not a non-empty list", FORMAT_HELP)
    for place, turn in enumerate(turns):
        read_turn(found, turn, name, place, unused)


def read_question(
    found: Conversation, row: Fields, name: str, answered: bool, unused: set[str]
) -> None:
    """A question and its answer, each text or a list of turns, or calls as the answer."""
    asked, answer = row.take(QUESTIONS), row.find(ANSWERS)
    if isinstance(asked, list):
        read_turns(found, asked, name, unused)
    else:
        if not as_text(asked, name).strip():
            raise RowError(f"empty '{name}'", "remove the row or fill it in")
        context = row.take(CONTEXTS)
        context = "\n\n".join(context) if is_list_of(str, context) else context
        context = "" if context in (None, [], {}) else as_text(context, row.find(CONTEXTS))
        found.add("user", question(asked, context), name)
        found.parts = (asked, context) if len(found.messages) == 1 else None
    if answer is None:
        if answered:
            missing = "missing field 'response' or 'output'"
            raise RowError(missing, INSTRUCTION_HELP, fields_of(row.value))
        return
    said = row.take(ANSWERS)
    if isinstance(said, dict) and is_list_of(str, said.get("text")):
        said = said["text"][0]  # as SQuAD has it: several ways to say the same
    if answer == "answers" and found.tools:  # calls of them
        read_turn(found, {"role": "assistant", "tool_calls": said}, answer, None, unused)
    elif isinstance(said, list):
        read_turns(found, said, answer, unused)
    elif not as_text(said, answer).strip():
        raise RowError(f"empty '{answer}'", "remove the row or fill it in")
    else:
        found.add("assistant", said, answer)


def question(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def read_history(history: Any) -> list[Any]:
    """Pairs [question, answer], or turns."""
    turns = []
    for n, given in enumerate(history or []):
        if isinstance(given, (list, tuple)) and len(given) == 2:
            roles = zip(("user", "assistant"), given, strict=True)
            turns += [{"role": role, "content": text} for role, text in roles]
        elif isinstance(given, dict):
            turns.append(given)
        else:
            remedy = 'write "history": [["question", "answer"], ...]'
            raise RowError("history is not a list of pairs", remedy, f"entry {n}")
    return turns


def read_turn(
    found: Conversation, given: Any, name: str, place: int | None, unused: set[str]
) -> None:
    """Append one turn to `found`; the names of its fields that are not used to `unused`."""
    n = len(found.messages)
    where = f"message {n if place is None else place}"
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
        reasoning = turn.take(REASONING) or reasoning
        if reasoning and as_text(reasoning, "reasoning_content").strip():
            message["reasoning_content"] = reasoning
        if not message["content"].strip() and not calls:
            raise RowError("empty assistant message", "remove the turn or fill it in", where)
    if role == "tool":
        message |= {k: turn.take((k,)) for k in ("name", "tool_call_id") if k in turn.value}
    message = named(found.messages, message)
    flag = read_flag(turn, where)
    if flag and role != "assistant":
        unused |= {f"{name}[].{key}" for key in FLAGS if turn.value.get(key)}
    found.messages.append(message)
    found.trained.append(flag is not False)
    found.places.append((name, place))
    unused |= {f"{name}[].{key}" for key in turn.left()}


def read_content(content: Any, role: str, where: str) -> tuple[str, str | None]:
    """(text, reasoning) of text, a list of parts, or nothing beside a call."""
    reasoning: list[str] = []
    if content in (None, []) and role == "assistant":
        return "", None
    if role == "tool" and isinstance(content, (dict, list)) and not is_parts(content):
        return json.dumps(content, ensure_ascii=False), None
    if is_parts(content):
        texts = []
        for part in content:
            kind = part.get("type", "text")
            if kind in ("thinking", "reasoning"):
                reasoning.append(as_text(part.get(kind, part.get("text")), f"a {kind} part"))
            elif kind in ("text", "input_text", "output_text"):
                texts.append(as_text(part.get("text"), "a text part"))
            else:
                remedy = "only text can be trained on: remove the row, or the part"
                raise RowError(f"a content part of type {kind!r}", remedy, where)
        content = "".join(texts)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise RowError("message content is not text", FORMAT_HELP, f"{where} is {kind}")
    return content, "\n".join(reasoning) or None


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
    given = from_json(given, "a tool call", where)
    calls = []
    for call in given if isinstance(given, list) else [given] if given else []:
        call = from_json(call, "a tool call", where)
        inner = call.get("function", call) if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str) or not name:
            raise RowError("a tool call has no name", CALL_HELP, where)
        arguments = inner.get("arguments", inner.get("parameters"))
        arguments = from_json(arguments or {}, "a tool call's arguments", where)
        if not isinstance(arguments, dict):
            raise RowError("a tool call's arguments are no JSON object", CALL_HELP, where)
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append(made | ({"id": call["id"]} if call.get("id") else {}))
    return calls


def named(before: list[dict], message: dict) -> dict:
    """Calls have an id, by which templates pair them with their results; results have the id and
    the name of the call that they answer: that of the same place where the row does not say."""
    calls = [call for m in before for call in m.get("tool_calls", ())]
    for n, call in enumerate(message.get("tool_calls", ())):
        call.setdefault("id", f"call{len(calls) + n:05}")
    if message["role"] == "tool":
        results = sum(m["role"] == "tool" for m in before)
        ids = {call["id"]: call for call in calls}
        call = ids.get(
            message.get("tool_call_id"), calls[results] if results < len(calls) else None
        )
        if call is not None:
            known = {"tool_call_id": call["id"], "name": call["function"]["name"]}
            message = {**message, **{k: message.get(k) or v for k, v in known.items()}}
    return message


def read_tools(given: Any) -> list[dict] | None:
    """Definitions in the form {"type": "function", "function": {…}}."""
    given = from_json(given, "tools", "")
    tools = []
    for tool in given if isinstance(given, list) else [given] if given else []:
        tool = from_json(tool, "a tool", "")
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = 'write "tools": [{"type": "function", "function": {"name": "...", ...}}]'
            raise RowError("a tool has no name", remedy, f"it is {tool!r}"[:80])
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools or None


def from_json(value: Any, what: str, where: str) -> Any:
    """Text is parsed, all else is as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        remedy = "write it as a JSON object"
        raise RowError(
            f"no JSON in {what}", remedy, f"{where} {str(error)[:80]}".strip()
        ) from error


def as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"'{name}' is not text", FORMAT_HELP, f"it is {type(value).__name__}")
    return value


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def is_parts(content: Any) -> bool:
    return is_list_of(dict, content) and all("type" in p or "text" in p for p in content)


def rewritten(record: dict, found: Conversation, answers: dict[int, str | None]) -> dict:
    """The record with other answers: {number of the message: text}. Of a turn that is replaced its
    role, its text and its flags stay; None makes it context instead."""
    if any(name == "history" for name, _ in found.places):  # it has no place for their fields
        kept = {k: v for k, v in record.items() if is_inert(k)} | {"messages": found.messages}
        found = Conversation(places=[("messages", n) for n in range(len(found.messages))])
        record = kept
    new = copy.deepcopy(record)
    for n, text in answers.items():
        name, place = found.places[n]
        if place is None:
            new[name] = text
            continue
        old = new[name][place]
        if text is None:
            new[name][place] = {**old, "weight": 0}
            continue
        kept = {k: v for k, v in old.items() if k in (*ROLE, *FLAGS)}
        new[name][place] = {**kept, Fields(old).find(TEXT) or "content": text}
    return new
