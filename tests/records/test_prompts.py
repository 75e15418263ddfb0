"""Files of prompts, and every way that one can be wrong. What is asked: test_layouts."""

import json

import pytest
from data_helpers import DATA, write_jsonl

from configs.errors import ConfigError
from eagle.errors import EagleError
from records.prompts import chat_prompt, fim_prompt, load_prompts, render

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "Hello"}
BAD = (DATA / "bad_prompts.jsonl").read_text("utf-8").splitlines()


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
    pair = {"prefix": "a", "suffix": ""}
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, "", {"turns": ["two"]}, pair, "{"])
    prompts = load_prompts(path, tokenizer, limit=3)  # a bad line behind the limit does no harm
    assert [tokenizer.decode(p.ids) for p in prompts[:2]] == ["one", CHAT.format("two")]
    assert [p.kind for p in prompts] == ["text", "chat", "fim"] and prompts[2].record == pair
    assert prompts[1].ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")  # a single id
    (tmp_path / "p.txt").write_text("a whole\nfile\n")
    (prompt,) = load_prompts(tmp_path / "p.txt", tokenizer)
    assert [p.where for p in prompts] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert tokenizer.decode(prompt.ids) == "a whole\nfile\n"
    odd = "a\u2028b\u2029c\x85d"  # JSON leaves these unescaped; they end no line
    text = json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + '{"prompt": "x"}'
    path.write_text(text, encoding="utf-8")
    assert [p.record["prompt"] for p in load_prompts(path, tokenizer)] == [odd, "x"]
    assert len(load_prompts(None, tokenizer)) >= 20  # the shipped ones


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named(tmp_path, tokenizer, line):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, "", line])
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
