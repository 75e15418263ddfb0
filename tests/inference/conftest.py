"""A tiny target on disk, a random head for it, and ways to run commands."""

import json
import shutil
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from engine_helpers import make_config, make_head, make_model
from transformers import AutoTokenizer

import configs.cli
from eagle.checkpoint import save_head
from eagle.target import Target
from tools.embedded.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x = 1\n",
    "Hello world, how are you? I am fine.\nThanks!",
    "Write a function that adds two numbers.",
] * 20


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("model")
    options = {"vocab_size": len(AutoTokenizer.from_pretrained(tokenizer_folder))}
    options |= {"eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2}
    make_model(make_config("llama", **options), seed=3).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def head_folder(tmp_path_factory, model_folder):
    target = Target.from_pretrained(model_folder, dtype=torch.float32, device="cpu")
    folder = tmp_path_factory.mktemp("head") / "head"
    save_head(make_head(target, 64), folder)
    return folder


@pytest.fixture
def base(model_folder, head_folder):
    return ["--base", model_folder, "--head", head_folder, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="session")
def command():
    """command("inference.bench", "--flag", …) -> the finished process."""
    return lambda *words, **more: commands.run(*words, CUDA_VISIBLE_DEVICES="", **more)


@pytest.fixture
def here(monkeypatch, capsys):
    """here("inference.bench", "--flag", …) in this process -> exit code, stdout, stderr."""
    return partial(commands.here, monkeypatch, capsys)


@pytest.fixture
def in_process(capsys):
    """Run a command function in this process, as its `main` does: (code, stdout, stderr)."""

    def run(function, *arguments):
        with pytest.raises(SystemExit) as exit:
            configs.cli.main(function, list(map(str, arguments)))
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def cli(in_process):
    """cli("taco", "--flag", …) of inference.evaluate -> (code, the JSON of the last line, stderr)."""
    from inference import evaluate

    def run(name, *arguments):
        code, out, err = in_process(evaluate.COMMANDS[name], *arguments)
        lines = out.splitlines()
        return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, err

    return run
