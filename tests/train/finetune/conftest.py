"""The trainers' libraries without their chatter, a tiny base, and one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(
    str(Path(__file__).parent)
)  # for finetune_helpers: importlib mode adds no test folder

from head_helpers import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries():
    from train.finetune.__main__ import require_libraries

    require_libraries()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_dir):
    """A random model of four layers with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir, hidden=64)
    return folder


@pytest.fixture(scope="session")
def other_base(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("other_base")
    save_tiny_model(folder, tokenizer_dir, seed=1, hidden=64)
    return folder
