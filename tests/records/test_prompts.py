"""Every kind of prompt record, and every way a prompt file can be wrong."""

import json

import pytest

from configs.errors import ConfigError
from eagle.errors import EagleError
from records.prompts import chat_prompt, fim_prompt, load_prompts, render

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def write(tmp_path, *lines, name="p.jsonl"):
    path = tmp_path / name
    path.write_text(
        "".join(
            (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines
        )
    )
    return path


@pytest.mark.parametrize(
    "record, kind, text",
    [
        ({"prompt": "def f():"}, "text", "def f():"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "chat", CHAT.format("Hello")),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "x"},
                ]
            },
            "chat",
            CHAT.format("Hello"),
        ),
        ({"instruction": "Add", "response": "x"}, "chat", CHAT.format("Add")),
        ({"instruction": "Add", "input": "1 2"}, "chat", CHAT.format("Add\n\n1 2")),
        (
            {"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]},
            "chat",
            CHAT.format("First?"),
        ),
        ({"question_id": 1, "turns": ["Only?"], "reference": ["y"]}, "chat", CHAT.format("Only?")),
    ],
)
def test_records(tokenizer, record, kind, text):
    prompt = render(tokenizer, record)
    assert prompt.kind == kind and prompt.record == record
    assert tokenizer.decode(prompt.ids) == text


def test_special_tokens_are_single_ids(tokenizer):
    ids = chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    vocabulary = tokenizer.get_vocab()
    ids = fim_prompt(tokenizer, "def f():\n", "    return 1\n")
    prefix, suffix, middle = (vocabulary[f"<|fim_{x}|>"] for x in ("prefix", "suffix", "middle"))
    assert ids[0] == prefix and ids[-1] == middle and ids.count(suffix) == 1
    cut = ids.index(suffix)
    assert (
        tokenizer.decode(ids[1:cut]) == "def f():\n"
        and tokenizer.decode(ids[cut + 1 : -1]) == "    return 1\n"
    )
    assert render(tokenizer, {"prefix": "a", "suffix": "", "middle": "b"}).kind == "fim"


def test_without_a_template_or_fim_tokens(tokenizer):
    tokenizer.chat_template = None
    prompt = render(tokenizer, {"messages": [{"role": "user", "content": "Hello"}]})
    assert prompt.kind == "text" and tokenizer.decode(prompt.ids) == "Hello"
    with pytest.raises(EagleError, match="chat template"):
        chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}])

    class Plain:
        eos_token_id = 0

        def get_vocab(self):
            return {"a": 1}

    with pytest.raises(ConfigError, match="fill-in-the-middle"):
        fim_prompt(Plain(), "a", "b")


def test_files(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "one"}, "", {"prompt": "two"}, {"turns": ["three"]})
    assert [tokenizer.decode(p.ids) for p in load_prompts(path, tokenizer)] == [
        "one",
        "two",
        CHAT.format("three"),
    ]
    assert len(load_prompts(path, tokenizer, limit=2)) == 2
    # a bad line behind the limit does no harm
    path = write(tmp_path, {"prompt": "one"}, "nonsense")
    assert len(load_prompts(path, tokenizer, limit=1)) == 1
    text = tmp_path / "p.txt"
    text.write_text("a whole\nfile\n")
    assert [tokenizer.decode(p.ids) for p in load_prompts(text, tokenizer)] == ["a whole\nfile\n"]


def test_records_are_cut_at_newlines_only(tmp_path, tokenizer):
    """JSON leaves U+2028, U+2029 and U+0085 unescaped; they end no line."""
    odd = "a\u2028b\u2029c\x85d"
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + '{"prompt": "x"}',
        encoding="utf-8",
    )
    assert [p.record["prompt"] for p in load_prompts(path, tokenizer)] == [odd, "x"]


def test_shipped_prompts(tokenizer):
    from records.prompts import HELDOUT_PROMPTS

    if not HELDOUT_PROMPTS.exists():
        pytest.skip("no shipped prompts in this checkout")
    prompts = load_prompts(None, tokenizer)
    assert len(prompts) >= 20


BAD = {
    "not JSON": "{not json",
    "cut off": '{"prompt": "a',
    "a list": ["x"],
    "a word": '"prefix suffix"',
    "a number": "5",
    "null": "null",
    "no known key": {"question": "x"},
    "prefix alone": {"prefix": "x"},
    "empty prompt": {"prompt": ""},
    "number as prompt": {"prompt": 5},
    "null as prompt": {"prompt": None},
    "list as prompt": {"prompt": ["a", "b"]},
    "number as prefix": {"prefix": 5, "suffix": "x"},
    "number as instruction": {"instruction": 5},
    "no turns": {"turns": []},
    "number as turn": {"turns": [5]},
    "text as messages": {"messages": "hello"},
    "no messages": {"messages": []},
    "answer alone": {"messages": [{"role": "assistant", "content": "x"}]},
    "message without content": {"messages": [{"role": "user"}]},
    "message without role": {"messages": [{"content": "x"}]},
    "number as content": {"messages": [{"role": "user", "content": 5}]},
    "message as text": {"messages": ["hello"]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(tmp_path, tokenizer, name):
    path = write(tmp_path, {"prompt": "fine"}, "", BAD[name])
    with pytest.raises(EagleError, match=r"p\.jsonl:3 "):
        load_prompts(path, tokenizer)


def test_template_that_refuses(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(EagleError, match=r"p\.jsonl:1 .*roles must alternate"):
        load_prompts(path, tokenizer)


def test_bad_files(tmp_path, tokenizer):
    with pytest.raises(EagleError, match="no prompt file"):
        load_prompts(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(EagleError, match="no prompt file"):
        load_prompts(tmp_path, tokenizer)
    for text in ("", "\n \n"):
        with pytest.raises(EagleError, match="holds no prompt"):
            load_prompts(write(tmp_path, text), tokenizer)
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(EagleError, match="UTF-8"):
        load_prompts(path, tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(EagleError, match="empty"):
        load_prompts(tmp_path / "empty.txt", tokenizer)
