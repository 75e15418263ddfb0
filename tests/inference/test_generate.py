"""The generate command: what it prints and writes."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from engine_helpers import plain
from transformers import AutoTokenizer

from eagle.target import Target
from inference.console import COMMANDS
from inference.generate import generate
from records.prompts import text_prompt


def expected(model_folder, texts, new, **options):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    target = Target.from_pretrained(model_folder, dtype="float32", device="cpu")
    rows = plain(target, [text_prompt(tokenizer, t) for t in texts], max_new_tokens=new, **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows], rows


def test_a_prompt_from_stdin_as_a_process(command, base, model_folder):
    flags = ["--prompt", "-", "--max_new_tokens", 12, "--tree", "8,4,2"]
    result = command("inference.generate", *base, *flags, stdin="def add(a, b):")
    assert result.returncode == 0, result.stderr
    (text,), _ = expected(model_folder, ["def add(a, b):"], 12)
    assert result.stdout == text + "\n"
    assert "12 tokens" in result.stderr and "tau" in result.stderr


@pytest.mark.parametrize(
    "way",
    [
        ["--prompt", "Hello", "--chat"],
        ["--prefix", "def f():\n", "--suffix", "\nreturn"],
        ["--prefix", "def f():\n"],
        ["--prompt", "def add(a, b):", "--compile", "off", "--tree", "auto"],
        ["--prompt", "x", "--temperature", "1.2", "--seed", "4", "--min_p", "0.1", "--top_k", "40"],
    ],
    ids=lambda way: way[-1].strip(),
)
def test_engines_agree_in_every_way_of_asking(in_process, base, compile_cache, way):
    asked = [*base, *way, "--max_new_tokens", 10, "--engine"]
    eagle, vanilla = (in_process(generate, *asked, engine) for engine in ("eagle", "vanilla"))
    assert eagle[0] == vanilla[0] == 0 and eagle[1] == vanilla[1] != "\n"


TEXTS = ["class Point:", "a", "def add(a, b):\n    return a", "Hello world", "x = 1"]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    return file


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "seed": 6}], ids=str)
def test_files_keep_their_order_at_every_batch_size(
    in_process, base, tmp_path, model_folder, source, sampling
):
    texts, _ = expected(model_folder, TEXTS, 9, **sampling)
    flags = [*base, "--prompts", source, "--max_new_tokens", 9]
    flags += [word for name, value in sampling.items() for word in (f"--{name}", value)]
    for size in (1, 2, 5):
        out = tmp_path / "new" / f"{size}.jsonl"
        code, stdout, _ = in_process(generate, *flags, "--output", out, "--batch_size", size)
        assert code == 0 and stdout == ""
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["prompt"]["prompt"] for r in records] == TEXTS
        assert all({"new_tokens", "finish_reason", "tau"} <= r.keys() for r in records)
        assert [r["completion"] for r in records] == texts
    code, stdout, _ = in_process(generate, *flags)
    assert [json.loads(line)["completion"] for line in stdout.splitlines()] == texts


def test_a_request_that_fails_is_reported_and_the_others_are_written(
    in_process, base, tmp_path, model_folder
):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [TEXTS[0], "word " * 400, TEXTS[2]]
    first, *rest = (json.dumps({"prompt": t}) + "\n" for t in texts)
    source.write_text(first + "\n" + "".join(rest))
    asked = [*base, *"--temperature 1.1 --seed 6 --max_new_tokens 9 --batch_size 2".split()]
    code, stdout, err = in_process(generate, *asked, "--prompts", source, "--output", out)
    assert code == 1 and stdout == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "error: 1 of 3 requests failed"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"]["prompt"] for r in records] == texts
    bad = records[1]
    assert bad["finish_reason"] == "error" and bad["completion"] == "" and bad["line"] == 3
    assert "256" in bad["error"] and f"{source}:3 failed: {bad['error']}" in err
    # seeds count lines with a prompt, the failed one included
    for place in (0, 2):
        (text,), _ = expected(model_folder, [texts[place]], 9, temperature=1.1, seed=6 + place)
        assert records[place]["completion"] == text and "error" not in records[place]


def test_stop_string(in_process, base, model_folder):
    _, (tokens,) = expected(model_folder, ["def add(a, b):"], 20)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    stop = next(s for s in map(tokenizer.decode, tokens) if s.isascii())  # no part of a character
    end = next(n for n in range(1, 21) if stop in tokenizer.decode(tokens[:n]))
    code, stdout, err = in_process(
        generate, *base, "--prompt", "def add(a, b):", "--stop", stop, "--max_new_tokens", 20
    )
    assert code == 0 and f"[{end} tokens" in err and "stop" in err


def test_console():
    for arguments, code in ((["--help"], 0), ([], 2), (["nonsense"], 1)):
        result = subprocess.run(
            [sys.executable, "-c", "from inference.console import main; main()", *arguments],
            capture_output=True,
            text=True,
        )
        assert result.returncode == code and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: unknown command 'nonsense'")
    for name, (module, text) in COMMANDS.items():
        assert name in result.stderr and find_spec(module) and text
