import random

import pytest
import regex
from data_helpers import runs

from configs.errors import ConfigError
from configs.fim_tokens import FAMILIES, find_fim_tokens
from configs.schema import DataConfig, FimTokens
from records.fim import cut_spans, render_fim
from records.prompts import fim_prompt
from records.render import make_renderer
from records.rows import RowError

SPANS = ("def add(a, b):\n", "    return a + b\n", "\nclass Point:\n")
RECORD = dict(zip(("prefix", "middle", "suffix"), SPANS, strict=True))
FILE = "".join(SPANS) + "    x = 1\n    y = 2\n"


def word_level(words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_are_found_in_the_tokenizer(family):
    prefix, suffix, middle, ends = FAMILIES[family]
    tokenizer = word_level([prefix, suffix, middle, ends[0], "[UNK]"])
    assert find_fim_tokens(tokenizer) == (0, 1, 2, 3, family)


def test_tokens_from_the_config(tokenizer):
    names = {"prefix": "<|im_start|>", "suffix": "<|im_end|>", "middle": "<|pad|>"}
    given = FimTokens(**names, eot="<|endoftext|>")
    ids = find_fim_tokens(tokenizer, given)
    assert ids.prefix == tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(ConfigError, match="'<nope>' is not a token"):
        find_fim_tokens(tokenizer, FimTokens(**names, eot="<nope>"))
    with pytest.raises(ConfigError, match="no fill-in-the-middle tokens.*fim_tokens"):
        find_fim_tokens(word_level(["a", "[UNK]"]))


@pytest.mark.parametrize("spm", [False, True])
def test_trimming_keeps_the_middle_and_the_near_context(tokenizer, spm):
    spans = ("a = 1\n" * 50 + "near = 2\n", "middle", "near\n" + "b = 2\n" * 50)
    tokens = find_fim_tokens(tokenizer)
    row = render_fim(spans, tokenizer, tokens, 60, spm)
    assert len(row.input_ids) == 60 and row.truncated
    assert runs(tokenizer, row) == ["middle<|endoftext|>"]
    text = tokenizer.decode(row.input_ids)
    assert "<|fim_suffix|>near\n" in text and (spm or "near = 2\n<|fim_suffix|>" in text)


def test_short_side_leaves_its_room_to_the_other(tokenizer):
    row = render_fim(("p", "middle", "b = 2\n" * 99), tokenizer, find_fim_tokens(tokenizer), 60)
    assert len(row.input_ids) == 60
    assert tokenizer.decode(row.input_ids).startswith("<|fim_prefix|>p<|fim_suffix|>b")


def test_middle_that_does_not_fit_is_refused(tokenizer):
    tokens = find_fim_tokens(tokenizer)
    size = len(render_fim(("", "abc " * 20, ""), tokenizer, tokens, 512).input_ids)
    assert not render_fim(("", "abc " * 20, ""), tokenizer, tokens, size).truncated
    with pytest.raises(RowError, match="the middle does not fit"):
        render_fim(("", "abc " * 20, ""), tokenizer, tokens, size - 1)


def test_cutter_partitions_the_file_and_is_seeded():
    spans = cut_spans(FILE, 8, random.Random(3))
    assert len(spans) == 8 and spans == cut_spans(FILE, 8, random.Random(3))
    assert spans != cut_spans(FILE, 8, random.Random(4))
    assert all("".join(span) == FILE and span[1].strip() for span in spans)


def test_whole_files_and_rates(tokenizer):
    cfg = DataConfig(fim_spans_per_file=3, fim_spm_rate=1.0)
    render = make_renderer("fim", cfg, tokenizer)
    rows = render({"content": FILE})
    assert len(rows) == 3 and rows == render({"content": FILE})
    fim = find_fim_tokens(tokenizer)
    assert all(row.input_ids[:2] == [fim.prefix, fim.suffix] for row in rows)
    assert len(make_renderer("fim", DataConfig(), tokenizer)(RECORD)) == 1


def test_literal_control_tokens_are_text(tokenizer):
    """The same in training and when asked; only the order's own tokens are control tokens."""
    fim, odd = find_fim_tokens(tokenizer), "'<|fim_middle|>' '<|endoftext|><|im_end|>' <think>"
    row = render_fim((odd, odd, odd), tokenizer, fim, 512)
    used = [token for token in row.input_ids if token in tokenizer.added_tokens_decoder]
    assert used == [fim.prefix, fim.suffix, fim.middle, fim.eot]
    asked = fim_prompt(tokenizer, odd, odd)
    assert row.input_ids[: len(asked)] == asked and tokenizer.decode(asked).count(odd) == 2


def test_cuts_are_between_whole_characters():
    text = "x = 'e\u0301a\u0308' # 👨‍👩‍👧👍🏽 🇩🇪🇫🇷\r\n" * 4
    cuts = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}
    for seed in range(200):
        ((before, middle, _),) = cut_spans(text, 1, random.Random(seed))
        assert {len(before), len(before + middle)} <= cuts and not middle.endswith("\r")
