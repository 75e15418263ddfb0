"""A tiny real tokenizer, chat templates, records and files, and what a mask supervises as text."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

DATA = Path(__file__).parents[1] / "data"
REFUSED = yaml.safe_load((DATA / "refused.yaml").read_text("utf-8").replace("LONG", "a " * 99))
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x = 1\n",
    "Hello world, how are you? I am fine.\nThanks! <think>reason</think>",
    "### Instruction:\n### Response:\nWrite a function that adds two numbers.",
] * 20


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    from tools.embedded.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 420, folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir):
    """Fresh for each test: tests change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


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


def read_jsonl(path):
    return list(map(json.loads, path.read_text("utf-8").splitlines()))


def write_jsonl(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def with_tokenizer(base, folder, change):
    """The model of `base` with its tokenizer changed."""
    shutil.copytree(base, folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder
