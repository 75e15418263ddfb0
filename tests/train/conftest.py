"""Tiny targets and data."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for data_helpers: importlib mode adds no test folder

import data_helpers

tokenizer, tokenizer_dir = data_helpers.tokenizer, data_helpers.tokenizer_dir


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


@pytest.fixture(scope="module", autouse=True)
def no_plots(request):
    """They take longer than the runs: test_tracking and the docs' commands have them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_tracking.py":
            patch.setattr("train.tracking.report.draw", lambda run: {})
        yield
