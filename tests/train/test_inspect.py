import pytest
from data_helpers import chat, write_jsonl

from configs.errors import ConfigError
from eagle.errors import EagleError
from train.inspect import inspect


def test_shows_supervised_tokens_and_what_is_wrong(tmp_path, tokenizer_dir, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    cache = f"data.cache_dir={tmp_path}"

    def shown(data_format, *records, **options):
        data = str(write_jsonl(tmp_path / f"{data_format}.jsonl", records))
        given = {"data_format": data_format, "data": data, "base": str(tokenizer_dir), "num": 1}
        code = inspect(cache, **given, **options)
        return code, capsys.readouterr()

    rows = [*(chat(f"Hi {n}?", "Yes.") for n in range(30)), "{"]
    code, plain = shown("chat", *rows, color="never")
    assert code == 0 and "⟦Yes.<|im_end|>⟧" in plain.out and "0 truncated" in plain.out
    assert "1 of 31 records bad" in plain.out and "chat.jsonl:31: malformed JSON" in plain.out
    coloured = shown("chat", *rows, color="always")[1].out
    assert "\x1b[1;32mYes.<|im_end|>" in coloured and "⟦" not in coloured
    reason = "all 1 rows are unusable: 1 x all-zero loss mask.*tokenized.jsonl:1.*check loss_mask"
    with pytest.raises(EagleError, match=reason):
        shown("tokenized", {"input_ids": [5, 6], "loss_mask": [0, 0]})
    with pytest.raises(ConfigError, match="must be auto, always or never"):
        shown("chat", *rows, color="pink")
