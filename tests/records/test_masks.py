"""Masks against a second way to find them: a regular expression over the rendered text, written for
each of twelve chat templates in the style of well known families, over the shapes of chats."""

import copy
import json
import re

import pytest
import yaml
from data_helpers import DATA, read_jsonl

from records.chat import render_chat
from records.rows import RowError
from records.tokens import load_tokenizer

TEMPLATES = yaml.safe_load((DATA / "templates.yaml").read_text("utf-8"))
SHAPES = DATA / "shapes.jsonl"


def templated(name):
    """The embedded model's tokenizer with a template and its tokens."""
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TEMPLATES[name]["tokens"]})
    tokenizer.chat_template = (DATA / "templates" / f"{name}.jinja").read_text("utf-8")
    return tokenizer


def expected_mask(tokenizer, ids, text, turns):
    """1 for tokens that lie in a turn, but for blanks at their begin."""
    mask, place = [], 0
    for token in ids:
        piece = tokenizer.decode([token])
        start = place + len(piece) - len(piece.lstrip(" "))
        place += len(piece)
        mask.append(int(any(a <= start and a < place <= b for a, b in turns)))
    assert place == len(text)
    return mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_the_turns_delimiters(name):
    template, tokenizer = TEMPLATES[name], templated(name)
    refused = template.get("refused", {})
    for shape in read_jsonl(SHAPES):
        given = {key: shape[key] for key in ("messages", "tools") if key in shape}
        row = copy.deepcopy(shape.get("row", given))
        if reason := refused.get(shape["name"]):
            with pytest.raises(RowError, match=reason):
                render_chat(row, tokenizer, 10**6)
            continue
        if template.get("arguments") == "text":
            for call in (c for m in given["messages"] for c in m.get("tool_calls", ())):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if name == "harmony":
            for message in given["messages"]:
                message["thinking"] = message.get("reasoning_content")
        messages = given.pop("messages")
        text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        ids, mask, *_ = render_chat(row, tokenizer, 10**6)
        assert tokenizer.decode(ids) == text, shape["name"]
        turns = [found.span(1) for found in re.finditer(template["turn"], text, re.DOTALL)]
        assert len(turns) == sum(m["role"] == "assistant" for m in messages)
        learnt = [turns[n] for n in shape["learnt"]]
        assert mask == expected_mask(tokenizer, ids, text, learnt), shape["name"]
        assert "".join(text[a:b] for a, b in learnt).strip()
