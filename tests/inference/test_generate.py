"""The generate command: what it prints and writes, and how it refuses."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from engine_helpers import make_head, make_target, plain
from transformers import AutoTokenizer

from eagle.checkpoint import save_head
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
        ["--prompt", "x", "--temperature", "1.2", "--seed", "4", "--top_p", "0.9", "--top_k", "40"],
    ],
    ids=lambda way: way[-1].strip(),
)
def test_engines_agree_in_every_way_of_asking(in_process, base, way):
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
    assert code == 1 and stdout == "" and one_error(err) and "1 of 3 requests failed" in err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"]["prompt"] for r in records] == texts
    bad = records[1]
    assert bad["finish_reason"] == "error" and bad["completion"] == "" and bad["line"] == 3
    assert "256" in bad["error"] and f"{source}:3 failed: {bad['error']}" in err
    # seeds count lines with a prompt, the failed one included
    for place in (0, 2):
        (text,), _ = expected(model_folder, [texts[place]], 9, temperature=1.1, seed=6 + place)
        assert records[place]["completion"] == text and "error" not in records[place]


def test_tree_auto_and_compile_off_keep_the_output(in_process, base, model_folder, compile_cache):
    (text,), _ = expected(model_folder, ["def add(a, b):"], 12)
    asked = (*base, "--prompt", "def add(a, b):", "--max_new_tokens", 12, "--compile", "off")
    code, stdout, err = in_process(generate, *asked, "--tree", "auto")
    assert code == 0 and stdout == text + "\n", err


def test_min_p(in_process, base, model_folder):
    asked = [
        *base,
        *"--prompt x --temperature 1.5 --seed 4 --max_new_tokens 10 --min_p 0.3".split(),
    ]
    with_it, without = (
        expected(model_folder, ["x"], 10, temperature=1.5, seed=4, min_p=p)[0] for p in (0.3, 0.0)
    )
    code, stdout, _ = in_process(generate, *asked)
    assert code == 0 and [stdout] == [with_it[0] + "\n"] and with_it != without


def test_stop_string(in_process, base, model_folder):
    _, (tokens,) = expected(model_folder, ["def add(a, b):"], 20)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    stop = next(s for s in map(tokenizer.decode, tokens) if s.isascii())  # no part of a character
    end = next(n for n in range(1, 21) if stop in tokenizer.decode(tokens[:n]))
    code, stdout, err = in_process(
        generate, *base, "--prompt", "def add(a, b):", "--stop", stop, "--max_new_tokens", 20
    )
    assert code == 0 and f"[{end} tokens" in err and "stop" in err


BAD = [
    "",
    "--prompt a --prefix b",
    "--suffix b",
    "--promt a",
    "--prompt a --engine turbo",
    "--prompt=",
    "--prompt a --temperature -1",
    "--prompt a --temperature hot",
    f"--prompt {'word' * 400}",
    "--prompt a --tree 16,4",
    "--prompt a --compile fast",
    "--prompts x --batch_size 0",
    "--prompts /no/such/file.jsonl",
    "--prompt a --output x",
    "--prompt a --dtype float7",
    "--prompt a --device toaster",
    "--prompt a --base /no/such/model",
    "--prompt a --head /no/such/head",
    f"--prompt a --temperature 1 --seed {2**70}",
]


def one_error(err):
    """One line for the user, no traceback."""
    *before, last = [line for line in err.splitlines() if line.strip()]
    rest = "\n".join(before)
    return last.startswith("error: ") and "error:" not in rest and "Traceback" not in rest


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: flags[:40])
def test_bad_input(in_process, base, flags):
    code, stdout, err = in_process(generate, *base, *flags.split())
    assert code != 0 and stdout == "" and one_error(err), err


def test_a_file_that_cannot_be_read_or_written_is_refused(in_process, base, source, tmp_path):
    for output in (tmp_path, source / "below" / "out.jsonl"):
        code, _, err = in_process(generate, *base, "--prompts", source, "--output", output)
        assert code != 0 and one_error(err) and "generating" not in err, err
    source.write_text('{"prompt": "a"}\n{oops\n')
    code, stdout, err = in_process(
        generate, *base, "--prompts", source, "--output", tmp_path / "out"
    )
    assert code != 0 and stdout == "" and one_error(err) and not (tmp_path / "out").exists()


def test_a_head_for_another_model(in_process, tmp_path, model_folder):
    save_head(make_head(make_target("llama")), tmp_path / "other")
    flags = ["--base", model_folder, "--dtype", "float32", "--prompt", "a"]
    code, _, err = in_process(generate, *flags, "--head", tmp_path / "other")
    assert code != 0 and one_error(err)
    # no head at all
    code, _, err = in_process(generate, *flags)
    assert code != 0 and one_error(err) and "--head" in err


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
