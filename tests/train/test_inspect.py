from pathlib import Path

import commands
from data_helpers import chat, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def inspect(cache, *arguments):
    return commands.run("train.inspect", *arguments, EAGLE_CACHE=str(cache), COLUMNS="80")


def test_shows_supervised_tokens_and_counts(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "d.jsonl", [*(chat(f"Hi {n}?", "Yes.") for n in range(30)), "{"])
    common = ("--data_format", "chat", "--data", path, "--base", tokenizer_dir, "--num", 1)
    plain = inspect(tmp_path, *common, "--color", "never")
    assert plain.returncode == 0, plain.stderr
    assert "⟦Yes.<|im_end|>⟧" in plain.stdout and "0 truncated" in plain.stdout
    assert "1 of 31 records bad" in plain.stdout and f"{path}:31: malformed JSON" in plain.stdout
    coloured = inspect(tmp_path, *common, "--color=always", "data.max_length=200")
    assert "\x1b[1;32mYes.<|im_end|>" in coloured.stdout and "⟦" not in coloured.stdout


def test_diagnoses_an_all_zero_mask(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [5, 6], "loss_mask": [0, 0]}])
    result = inspect(
        tmp_path, "--data_format", "tokenized", "--data", path, "--base", tokenizer_dir
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("error: all 1 rows are unusable: 1 x all-zero loss mask")
    assert f"{path}:1" in line and "check loss_mask/labels" in line


def test_user_errors_are_one_line(tmp_path):
    for arguments, message in [
        (["--data_formt", "fim"], "did you mean --data_format?"),
        (["--data_format", "poem"], "data.format=poem"),
        (["--color", "pink"], "must be auto, always or never"),
        (["data.max_lenght=3"], "did you mean data.max_length?"),
        (["--base", str(tmp_path / "none")], "no model folder"),
    ]:
        result = inspect(tmp_path, *arguments)
        assert result.returncode == 1, arguments
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line
