"""What tokenizers and lengths do to a chat. Which tokens are learnt: test_layouts, test_masks."""

import pytest
from data_helpers import chat, runs
from tokenizers import processors

from records.chat import render_chat, render_instruction
from records.rows import RowError
from records.tokens import encode_with_spans

LONG = 4096


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


@pytest.mark.parametrize("trim", [True, False])
def test_spans_do_not_depend_on_trimmed_offsets(tokenizer, trim):
    processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.backend_tokenizer.post_processor = processor
    text = "a  b\n\n c é😀\t<|im_end|> d "
    ids, spans = encode_with_spans(tokenizer, text)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(left[1] >= right[0] for left, right in zip(spans, spans[1:], strict=False))
    row = render_chat(chat("Hi?", "  Hello é😀 \n\n"), tokenizer, LONG)
    # the blanks before the answer share a token with nothing of the header's newline here
    assert "".join(runs(tokenizer, row)).endswith("Hello é😀 \n\n<|im_end|>")


def test_truncation_is_flagged_and_a_lost_answer_refused(tokenizer):
    full = render_chat(chat("Hi?", "Hello world " * 5), tokenizer, LONG)
    first = full.loss_mask.index(1)
    cut = render_chat(chat("Hi?", "Hello world " * 5), tokenizer, first + 2)
    assert cut.truncated and cut.input_ids == full.input_ids[: first + 2]
    assert sum(cut.loss_mask) == 2 and not full.truncated
    with pytest.raises(RowError, match="beyond max_length"):
        render_chat(chat("Hi?", "Hello world " * 5), tokenizer, first)


def test_without_a_template_instructions_have_the_alpaca_form(tokenizer):
    record = {"instruction": "Add.", "input": "1 2", "response": "the sum"}
    row = render_instruction(record, tokenizer, LONG, template="alpaca")
    tokenizer.chat_template = None
    assert render_instruction(record, tokenizer, LONG) == row
    assert runs(tokenizer, row) == ["the sum<|endoftext|>"]
