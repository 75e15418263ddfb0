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
from inference.generate import generate, prepare
from records.prompts import text_prompt


@pytest.fixture
def base(model_folder, head_folder):
    return ["--base", model_folder, "--head", head_folder, "--dtype", "float32", "--device", "cpu"]


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


def test_engines_agree_in_every_way_of_asking(in_process, base, monkeypatch):
    ways = (
        ["--prompt", "def add(a, b):"],
        ["--prompt", "Hello", "--chat"],
        ["--prefix", "def f():\n", "--suffix", "\nreturn"],
        ["--prefix", "def f():\n"],
        ["--prompt", "x", "--temperature", "1.2", "--seed", "4", "--top_p", "0.9", "--top_k", "40"],
    )
    for way in ways:
        outputs = [
            in_process(generate, *base, *way, "--max_new_tokens", 10, "--engine", engine)
            for engine in ("eagle", "vanilla")
        ]
        assert [code for code, _, _ in outputs] == [0, 0]
        assert outputs[0][1] == outputs[1][1] != "\n"


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
    sampling = ["--temperature", "1.1", "--seed", "6", "--max_new_tokens", 9]
    asked = (*base, "--prompts", source, *sampling, "--batch_size", 2)
    code, stdout, err = in_process(generate, *asked, "--output", out)
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
    # on stdout too
    code, stdout, _ = in_process(generate, *asked)
    assert code == 1 and [json.loads(line) for line in stdout.splitlines()] == records


def test_more_prompts_than_rows_are_all_in_flight_in_turn(in_process, base, source, monkeypatch):
    from eagle import EaModel

    seen, many = [], EaModel.generate_many

    def watched(self, prompts, **options):
        def hook(cache, drafter):
            seen.append(len(cache.order))

        return many(self, prompts, on_cache=hook, **options)

    monkeypatch.setattr(EaModel, "generate_many", watched)
    flags = ["--prompts", source, "--max_new_tokens", 9, "--batch_size", 2]
    code, stdout, err = in_process(generate, *base, *flags)
    assert code == 0 and len(stdout.splitlines()) == 5 and "5 completions" in err
    assert max(seen) == 2 and sum(seen) > len(seen)  # two at a time, mostly


def test_tree_auto_and_compile_off_keep_the_output(in_process, base, model_folder, compile_cache):
    (text,), _ = expected(model_folder, ["def add(a, b):"], 12)
    asked = (*base, "--prompt", "def add(a, b):", "--max_new_tokens", 12, "--compile", "off")
    for tree in ("auto", "8,4,2"):
        code, stdout, err = in_process(generate, *asked, "--tree", tree)
        assert code == 0 and stdout == text + "\n", err


def test_min_p(in_process, base, model_folder):
    asked = (*base, "--prompt", "x", "--temperature", "1.5", "--seed", "4", "--max_new_tokens", 10)
    outputs = {}
    for min_p in (0.0, 0.3):
        (text,), _ = expected(model_folder, ["x"], 10, temperature=1.5, seed=4, min_p=min_p)
        code, outputs[min_p], _ = in_process(generate, *asked, "--min_p", min_p)
        assert code == 0 and outputs[min_p] == text + "\n"
    assert outputs[0.0] != outputs[0.3]


def test_compiling_is_told_apart_from_generating(capsys):
    class Model:
        def prepare(self, draft):
            return {"target": 2.04} if draft else {}

    prepare(Model(), "vanilla")
    assert capsys.readouterr().err == ""
    prepare(Model(), "eagle")
    assert capsys.readouterr().err == "[compiled or loaded: target 2.0 s]\n"


def test_stop_string(in_process, base, model_folder):
    _, (tokens,) = expected(model_folder, ["def add(a, b):"], 20)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    stop = next(s for s in map(tokenizer.decode, tokens) if s.isascii())  # no part of a character
    end = next(n for n in range(1, 21) if stop in tokenizer.decode(tokens[:n]))
    code, stdout, err = in_process(
        generate, *base, "--prompt", "def add(a, b):", "--stop", stop, "--max_new_tokens", 20
    )
    assert code == 0 and f"[{end} tokens" in err and "stop" in err


BAD = {
    "nothing asked": "",
    "two prompts": "--prompt a --prefix b",
    "suffix alone": "--suffix b",
    "unknown flag": "--promt a",
    "unknown engine": "--prompt a --engine turbo",
    "empty prompt": "--prompt=",
    "negative temperature": "--prompt a --temperature -1",
    "temperature as text": "--prompt a --temperature hot",
    "top_p": "--prompt a --temperature 1 --top_p 1.5",
    "no new tokens": "--prompt a --max_new_tokens 0",
    "too long": f"--prompt {'word' * 400}",
    "tree": "--prompt a --tree 16,4",
    "compile": "--prompt a --compile fast",
    "min_p": "--prompt a --temperature 1 --min_p 1.5",
    "batch size": "--prompts x --batch_size 0",
    "missing file": "--prompts /no/such/file.jsonl",
    "output without file": "--prompt a --output x",
    "dtype": "--prompt a --dtype float7",
    "device": "--prompt a --device toaster",
    "missing base": "--prompt a --base /no/such/model",
    "missing head": "--prompt a --head /no/such/head",
    "huge seed": f"--prompt a --temperature 1 --seed {2**70}",
}


def one_error(err):
    """One line for the user, no traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    return (
        "Traceback" not in err
        and lines
        and lines[-1].startswith("error: ")
        and sum(line.startswith("error:") for line in lines) == 1
    )


@pytest.mark.parametrize("name", BAD)
def test_bad_input(in_process, base, name):
    code, stdout, err = in_process(generate, *base, *BAD[name].split())
    assert code != 0 and stdout == "" and one_error(err), err


def test_bad_input_as_a_process(command, base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{oops\n')
    out = tmp_path / "out.jsonl"
    result = command("inference.generate", *base, "--prompts", bad, "--output", out)
    assert result.returncode != 0 and result.stdout == ""
    assert one_error(result.stderr) and len(result.stderr.splitlines()) == 1, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    in_process, base, source, tmp_path
):
    for output in (tmp_path, source / "below" / "out.jsonl"):
        code, _, err = in_process(generate, *base, "--prompts", source, "--output", output)
        assert code != 0 and one_error(err) and "generating" not in err, err


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
