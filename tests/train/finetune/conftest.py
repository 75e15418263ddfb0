"""The trainers' libraries without their chatter, a tiny base, one thread, and a run for all."""

import sys
from pathlib import Path

import pytest
import torch

# for finetune_helpers: importlib mode adds no test folder
sys.path.append(str(Path(__file__).parent))

from head_helpers import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries():
    from train.finetune.__main__ import require_libraries

    require_libraries()
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    from finetune_helpers import instructions

    return instructions(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def whole(base, data, tmp_path_factory):
    """Six steps with dropout, accumulation and checkpointing, saved and evaluated on the way, and
    far from the base."""
    from finetune_helpers import SIX, go

    return go("sft", base, data, tmp_path_factory.mktemp("runs") / "whole", **SIX)
