import pytest
from data_helpers import BLANK_BEFORE_END, REWRITING, STRIPPING, THINKING, chat, runs
from tokenizers import processors

from configs.schema import DataConfig
from eagle.errors import EagleError
from records.chat import render_chat, render_instruction
from records.render import make_renderer
from records.rows import RowError
from records.tokens import encode_with_spans

LONG = 4096


FIRST, LAST = "<think>\nold\n</think>\n\nHello", "<think>\nnew\n</think>\n\nBye"
END, EOS = "<|im_end|>", "<|endoftext|>"
CASES = {
    "own": (None, ["Hi?", " Hello\nworld ", "And?", "Bye é😀"], [" Hello\nworld ", "Bye é😀"], END),
    "think": (None, ["Hi?", "<think>short</think>Bye"], ["<think>short</think>Bye"], END),
    "strip": (STRIPPING, ["Hi?", "  Hello \n", "And?", "\nBye"], ["Hello", "Bye"], END),
    "thinking": (THINKING, ["Hi?", "Hello", "And?", "Bye"], ["Hello", "Bye"], END),
    "reason": (THINKING, ["Hi?", FIRST, "And?", LAST], ["Hello", LAST], END),  # where it is kept
    "blank": (BLANK_BEFORE_END, ["Hi?", "Hello"], ["Hello "], EOS),
    "glued": (BLANK_BEFORE_END, ["Hi?", "a function"], [" a function "], EOS),
}


@pytest.mark.parametrize("template, turns, answers, end", CASES.values(), ids=CASES)
def test_each_answer_and_its_end_is_supervised(tokenizer, template, turns, answers, end):
    tokenizer.chat_template = template or tokenizer.chat_template
    row = render_chat(chat(*turns), tokenizer, LONG)
    assert runs(tokenizer, row) == [answer + end for answer in answers] and not row.truncated
    whole = tokenizer.decode(row.input_ids, skip_special_tokens=False)
    if template is THINKING:
        assert "old" not in whole and "<think>\n" in whole
    else:
        assert whole.startswith("<|im_start|>user\nHi?<|im_end|>\n" if end == END else "user: Hi? ")


@pytest.mark.parametrize("answer", ["same", "user", "assistant\n", "a\n\nb"])
def test_answer_that_also_occurs_elsewhere(tokenizer, answer):
    row = render_chat(chat(answer, answer, answer, "x" + answer), tokenizer, LONG)
    assert runs(tokenizer, row) == [answer + END, "x" + answer + END]


def test_last_assistant_and_all(tokenizer):
    record = chat("Hi?", "one", "And?", "two")
    row = render_chat(record, tokenizer, LONG, "last_assistant")
    assert runs(tokenizer, row) == ["two<|im_end|>"]
    mask = render_chat(record, tokenizer, LONG, "all").loss_mask
    assert mask == [0] + [1] * (len(mask) - 1)


def test_sentencepiece_style_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.BPE(unk_token="<unk>"))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    unigram.decoder = decoders.Metaspace(prepend_scheme="first")
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=200, **special)
    unigram.train_from_iterator(["[INST] Hi there, you? [/INST] I am fine"] * 9, trainer)
    llama = PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", eos_token="</s>")
    llama.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    row = render_chat(chat("Hi there", "I am", "you?", "fine"), llama, LONG)
    ids = [token for token, mark in zip(*row[:2], strict=True) if mark]
    text = "".join(llama.convert_ids_to_tokens(ids))
    assert text == "▁I▁am▁</s>▁fine▁</s>"
    assert row.input_ids[0] == llama.bos_token_id and row.loss_mask[-1] == 1


def test_a_template_that_cannot_be_followed_refuses_the_row(tokenizer):
    refusing = "{{ raise_exception('no system role') }}"
    for template, reason in (
        (REWRITING, "rewrites an assistant turn"),
        (refusing, "refuses these messages.*no system role"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(RowError, match=reason):
            render_chat(chat("Hi?", "Hello"), tokenizer, LONG)


def test_pad_equal_to_eos_keeps_the_end_token(tokenizer):
    tokenizer.chat_template = BLANK_BEFORE_END
    tokenizer.pad_token = tokenizer.eos_token
    row = render_chat(chat("Hi?", "Hello"), tokenizer, LONG)
    assert row.input_ids[-1] == tokenizer.pad_token_id and row.loss_mask[-1] == 1


@pytest.mark.parametrize("trim", [True, False])
def test_spans_do_not_depend_on_trimmed_offsets(tokenizer, trim):
    processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.backend_tokenizer.post_processor = processor
    text = "a  b\n\n c é😀\t<|im_end|> d "
    ids, spans = encode_with_spans(tokenizer, text)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(left[1] >= right[0] for left, right in zip(spans, spans[1:], strict=False))
    row = render_chat(chat("Hi?", "  Hello \n\n"), tokenizer, LONG)
    # the blanks before the answer share a token with nothing of the header's newline here
    assert "".join(runs(tokenizer, row)).endswith("Hello \n\n<|im_end|>")


def test_truncation_is_flagged_and_a_lost_answer_refused(tokenizer):
    full = render_chat(chat("Hi?", "Hello world " * 5), tokenizer, LONG)
    first = full.loss_mask.index(1)
    cut = render_chat(chat("Hi?", "Hello world " * 5), tokenizer, first + 2)
    assert cut.truncated and cut.input_ids == full.input_ids[: first + 2]
    assert sum(cut.loss_mask) == 2
    with pytest.raises(RowError, match="beyond max_length"):
        render_chat(chat("Hi?", "Hello world " * 5), tokenizer, first)


def test_chat_without_a_template_names_the_remedy(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(EagleError, match="chat_template.jinja"):
        make_renderer("chat", DataConfig(), tokenizer)


@pytest.mark.parametrize("context", ["", "1 2"])
def test_instruction_alpaca(tokenizer, context):
    record = {"instruction": "Add.", "input": context, "response": "the sum"}
    row = render_instruction(record, tokenizer, LONG, template="alpaca")
    assert runs(tokenizer, row) == ["the sum<|endoftext|>"]
    text = tokenizer.decode(row.input_ids)
    assert ("### Input:\n1 2\n\n### Response:\n" in text) == bool(context)
    tokenizer.chat_template = None
    assert render_instruction(record, tokenizer, LONG) == row
