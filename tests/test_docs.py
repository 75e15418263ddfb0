"""What the README and docs/ show runs as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from engine_helpers import assert_quiet

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# what keeps a command short here, by its first words
SMALL = {
    "inference.generate": ["--max_new_tokens", "8"],
    "inference.bench": "--num_prompts 2 --max_new_tokens 8 --repeats 1".split(),
    "train.main": ["train.max_steps=2", "train.batch_size=2", "eval.num_prompts=0"],
}


def blocks(page, language):
    """The fenced blocks of a language ("" for plain ones), in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)
    return [text for name, text in fenced if name == language]


def commands(language, *pages):
    """Every `python -m …` of the pages' blocks, as words from the module on, each once."""
    found = {}
    for block in (block for page in pages for block in blocks(page, language)):
        text = block.replace("\\\n", " ")
        if not language:  # also formulas and tables
            text = "\n".join(line for line in text.splitlines() if " -m " in line)
        words = shlex.split(text, comments=True)
        starts = [i for i, w in enumerate(words) if w in ("python", "torchrun", "deepspeed")]
        for a, b in zip(starts, [*starts, len(words)][1:], strict=True):
            command = words[a:b]
            module = next((i for i, w in enumerate(command) if w in ("-m", "--module")), None)
            if module is not None:
                found[tuple(command[module + 1 :])] = None
    return list(found)


def small(words):
    subject = len(words) > 1 and words[1].isalpha()  # of the bench: its flags are its own
    return [*words, *([] if subject else SMALL.get(words[0], []))]


@pytest.mark.parametrize("words", commands("bash", README), ids=" ".join)
def test_commands_of_the_readme(words, tmp_path, compile_cache):
    """From a plain shell, in a process that has imported nothing; no dependency warns."""
    ours = ("PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # to compile the embedded model takes minutes: tiny ones are in eagle/test_compile.py
    whole = words[0] == "inference.bench" and "--engines" not in words
    engines = ["--engines", "hf,vanilla,eagle"] if whole else []
    command = [sys.executable, "-m", *small(words), *engines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_quiet(done)
    if whole:
        found = json.loads((tmp_path / "runs/bench.json").read_text())
        assert all(r["tau"] > 1.5 for r in found["runs"] if r["engine"] == "eagle")
        assert set(found["identical"].values()) == {True}


OTHERS = [c for c in commands("bash", *PAGES) if c not in commands("bash", README)]


@pytest.mark.slow
@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_commands_of_the_docs(words, tmp_path):
    done = run(*small(words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", commands("", *PAGES), ids=" ".join)
def test_commands_with_the_readers_own_files_have_real_flags(words):
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    name = [word for word in words[:2] if re.fullmatch(r"[a-z_.]+", word)]
    said = run(*name, "--help").stdout
    assert said and not {flag for flag in flags if not re.search(rf"{flag}\b", said)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "inference.evaluate taco --allow_code_execution --limit 1 --n_samples 1 --max_new_tokens 8 --output made",
        f"inference.convert {ROOT}/eagle/embedded/heads/eagle3 made --to vllm --target embedded",
        "train.finetune sft --data rows.jsonl --output made train.max_steps=1 data.heldout_fraction=0.1",
    ],
    ids=lambda words: words.split()[0],
)
def test_main_commands_are_quiet(words, tmp_path, compile_cache):
    rows = [{"instruction": f"say {n}", "output": "x " * n} for n in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test_commands_of_the_readme(tuple(words.split()), tmp_path, compile_cache)
    assert list((tmp_path / "made").iterdir())


def test_python_of_the_readme(capsys):
    """As a reader types it, in one namespace with what docs/generate.md goes on with."""
    names = {}
    (first,) = blocks(README, "python")
    exec(compile(first, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "def get_value(self, key):\n    if key in self." in shown
    assert "return" in shown.split("self.", 1)[1]  # something that a reader enjoys
    assert re.search(r"\d\.\d+ \['(eos|length)', '(eos|length)'\]", shown)
    for block in blocks(ROOT / "docs/generate.md", "python"):
        exec(compile(block, "docs/generate.md", "exec"), names)
    assert "] None" in capsys.readouterr().out


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
