"""What the README shows runs as it stands there."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import assert_quiet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    """Every `python -m …` of the bash blocks, quoted line breaks kept."""
    lexed = [shlex.split(block, comments=True) for block in blocks("bash")]
    found = []
    for words in lexed:
        starts = [i for i, word in enumerate(words) if word == "python"]
        found += [words[a:b] for a, b in zip(starts, [*starts, len(words)][1:], strict=True)]
    return found


def run(command, cwd, extra=()):
    """The finished process of a `python -m …`, started from a plain shell; no dependency warns of
    anything.
    """
    ours = ("PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command[1:], *extra],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert_quiet(done)
    return done


def test_python_snippets(capsys):
    """In order and in one namespace, as a reader types them."""
    first, *others = blocks("python")
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "def get_value(self, key):\n    if key in self." in shown
    assert (
        "return" in shown.split("self.", 1)[1]
    )  # something that a reader enjoys, not one backtick
    assert re.search(r"\d\.\d+ \['(eos|length)', '(eos|length)'\]", shown)
    (requests,) = others
    exec(compile(requests, "README.md", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and all(line.endswith("] None") for line in shown)


@pytest.mark.parametrize(
    "command", [c for c in commands() if c[2] == "inference.generate"], ids=" ".join
)
def test_generate_commands(command, tmp_path):
    done = run(command, tmp_path, ("--max_new_tokens", "8"))
    assert done.returncode == 0, done.stderr
    assert "tau" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in commands() if c[2] == "inference.bench"], ids=" ".join
)
def test_bench_commands(command, tmp_path):
    small = ("--num_prompts", "2", "--max_new_tokens", "8", "--repeats", "1")
    done = run(command, tmp_path, small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith('{"device"')


def test_inspect_command(tmp_path):
    (command,) = [c for c in commands() if c[2] == "train.inspect"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c[2] == "train.main"], ids=" ".join)
def test_train_commands(command, tmp_path):
    small = ("train.max_steps=2", "train.batch_size=2", "eval.num_prompts=0")
    done = run(command, tmp_path, small)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/head/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "inference.evaluate taco --allow_code_execution --limit 1 --n_samples 1 --max_new_tokens 8 --output made",
        f"inference.convert {ROOT}/eagle/embedded/heads/eagle3 made --to vllm --target embedded",
        "train.finetune sft --data rows.jsonl --output made train.max_steps=1 data.heldout_fraction=0.1",
    ],
    ids=lambda command: command.split()[0],
)
def test_other_commands(command, tmp_path):
    rows = ({"instruction": f"say {n}", "output": "x " * n} for n in range(1, 21))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(["python", "-m", *command.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "made").iterdir())


def test_pipeline_command(tmp_path):
    """That it is understood; tests/inference/test_pipeline.py runs it."""
    (command,) = [c for c in commands() if c[2] == "examples.pipeline"]
    done = run(command, tmp_path, ("--num_prompts", "0"))
    assert done.returncode == 1 and done.stderr == "error: num_prompts must be at least 1, not 0\n"


def test_placeholder_commands_have_real_flags():
    """Commands that need the reader's own files: every flag is one of the command's."""
    lines = [
        c
        for language, block in re.findall(r"```(\w*)\n(.*?)```", README, re.S)
        if not language
        for c in block.replace("\\\n", " ").split("\n")
    ]
    checked = 0
    for line in lines:
        words = line.split()
        if words[:3] == ["python", "-m", "train.finetune"]:
            from train.finetune.__main__ import COMMANDS

            function = COMMANDS[words[3]]
        elif words[:3] == ["python", "-m", "examples.pipeline"]:
            from examples.pipeline import pipeline as function
        else:
            continue
        flags = {w.removeprefix("--") for w in words if w.startswith("--")}
        assert flags <= set(inspect.signature(function).parameters), line
        checked += 1
    assert checked >= 4
