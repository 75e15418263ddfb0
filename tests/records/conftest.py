"""A tiny real tokenizer for the data tests."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "train"))  # for data_helpers

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
