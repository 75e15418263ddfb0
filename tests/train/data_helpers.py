"""Chat templates, records and files for the data tests, and what a mask supervises as text."""

import json

STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}"
)
# the last assistant turn gets a think block; earlier turns lose theirs (as Qwen3's does)
THINKING = (
    "{% for m in messages %}{% set content = m.content %}{% set reason = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set reason = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ reason }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
)
REWRITING = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}<|im_end|>\n{% endfor %}"
BLANK_BEFORE_END = "{% for m in messages %}{{ m.role }}: {{ m.content }} <|endoftext|>{% endfor %}"


def runs(tokenizer, row):
    """Text of each supervised run."""
    texts, ids = [], []
    for token, supervised in [*zip(row[0], row[1], strict=True), (0, 0)]:
        if supervised:
            ids.append(token)
        elif ids:
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
    return texts


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]}


def write_jsonl(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
