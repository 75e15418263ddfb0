"""A tiny real tokenizer for the data tests."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for data_helpers: importlib mode adds no test folder

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


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_dir):
    """A folder with a tiny random target."""
    from head_helpers import save_tiny_model

    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small FIM file."""
    from head_helpers import write_fim

    path = tmp_path_factory.mktemp("data") / "fim.jsonl"
    write_fim(path)
    return path


@pytest.fixture
def tokenizer(tokenizer_dir):
    """Fresh for each test: tests change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)
