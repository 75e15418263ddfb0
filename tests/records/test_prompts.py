"""Every kind of prompt record, and every way a prompt file can be wrong."""

import json

import pytest
from data_helpers import write_jsonl

from configs.errors import ConfigError
from eagle.errors import EagleError
from records.prompts import chat_prompt, fim_prompt, load_prompts, render

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    "record, kind, text",
    [
        ({"messages": [USER]}, "chat", CHAT.format("Hello")),
        ({"instruction": "Add", "response": "x"}, "chat", CHAT.format("Add")),
        ({"instruction": "Add", "input": "1 2"}, "chat", CHAT.format("Add\n\n1 2")),
    ],
)
def test_records(tokenizer, record, kind, text):
    prompt = render(tokenizer, record)
    assert prompt.kind == kind and prompt.record == record
    assert tokenizer.decode(prompt.ids) == text


def test_special_tokens_are_single_ids(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert chat_prompt(tokenizer, [USER])[0] == vocabulary["<|im_start|>"]
    ids = fim_prompt(tokenizer, "def f():\n", "    return 1\n")
    prefix, suffix, middle = (vocabulary[f"<|fim_{x}|>"] for x in ("prefix", "suffix", "middle"))
    assert ids[0] == prefix and ids[-1] == middle and ids.count(suffix) == 1
    cut = ids.index(suffix)
    texts = [tokenizer.decode(part) for part in (ids[1:cut], ids[cut + 1 : -1])]
    assert texts == ["def f():\n", "    return 1\n"]
    assert render(tokenizer, {"prefix": "a", "suffix": "", "middle": "b"}).kind == "fim"


def test_without_a_template_or_fim_tokens(tokenizer, monkeypatch):
    tokenizer.chat_template = None
    prompt = render(tokenizer, {"messages": [USER]})
    assert prompt.kind == "text" and tokenizer.decode(prompt.ids) == "Hello"
    with pytest.raises(EagleError, match="chat template"):
        chat_prompt(tokenizer, [USER])
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 1})
    with pytest.raises(ConfigError, match="fill-in-the-middle"):
        fim_prompt(tokenizer, "a", "b")


def test_files(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, "", {"turns": ["two"]}, "bad"])
    prompts = load_prompts(path, tokenizer, limit=2)  # a bad line behind the limit does no harm
    assert [tokenizer.decode(p.ids) for p in prompts] == ["one", CHAT.format("two")]
    (tmp_path / "p.txt").write_text("a whole\nfile\n")
    (prompt,) = load_prompts(tmp_path / "p.txt", tokenizer)
    assert [p.where for p in prompts] == [f"{path}:1", f"{path}:3"]
    assert tokenizer.decode(prompt.ids) == "a whole\nfile\n"
    odd = "a\u2028b\u2029c\x85d"  # JSON leaves these unescaped; they end no line
    text = json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + '{"prompt": "x"}'
    path.write_text(text, encoding="utf-8")
    assert [p.record["prompt"] for p in load_prompts(path, tokenizer)] == [odd, "x"]
    assert len(load_prompts(None, tokenizer)) >= 20  # the shipped ones


BAD = {
    "not JSON": "{not json",
    "a list": ["x"],
    "a word": '"prefix suffix"',
    "null": "null",
    "no known key": {"sentence": "x"},
    "prefix alone": {"prefix": "x"},
    "empty prompt": {"prompt": ""},
    "number as prompt": {"prompt": 5},
    "list as prompt": {"prompt": ["a", "b"]},
    "number as prefix": {"prefix": 5, "suffix": "x"},
    "number as instruction": {"instruction": 5},
    "no turns": {"turns": []},
    "text as messages": {"messages": "hello"},
    "answer alone": {"messages": [ANSWER]},
    "message without content": {"messages": [{"role": "user"}]},
    "message as text": {"messages": ["hello"]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(tmp_path, tokenizer, name):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, "", BAD[name]])
    with pytest.raises(EagleError, match=r"p\.jsonl:3 "):
        load_prompts(path, tokenizer)


def test_template_that_refuses(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": [USER]}])
    with pytest.raises(EagleError, match=r"p\.jsonl:1 .*roles must alternate"):
        load_prompts(path, tokenizer)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.jsonl", None, "no such data file"),
        (".", None, "neither a .jsonl"),
        ("p.jsonl", b"\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "é"}'.encode("latin-1"), "UTF-8"),
        ("p.txt", b"", "empty"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EagleError, match=message):
        load_prompts(tmp_path / name, tokenizer)
