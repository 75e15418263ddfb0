"""Layouts of other people's files: what each teaches, as docs/data.md shows it; what of a row is
not used is said."""

import layouts
import pytest
from data_helpers import chat, write_jsonl

from configs.schema import DataConfig
from eagle.errors import EagleError
from records import load_dataset_for
from train.prepare.records import Answer, Rewriter

LISTED = layouts.LISTED


@pytest.mark.parametrize("name", LISTED)
def test_what_a_layout_teaches(name):
    layout = LISTED[name]
    told = {key: layout[key] for key in ("learnt", "unused", "refused") if key in layout}
    assert layouts.outcome(name, layout) == told


def test_the_page_shows_them():
    page = layouts.PAGE.read_text("utf-8")
    assert layouts.with_table(page) == page
    assert len(LISTED) >= 40 and len(list((layouts.DATA / "layouts").iterdir())) == len(LISTED)


def test_unused_fields_are_named_with_their_counts_from_the_cache_too(tmp_path, caplog, tokenizer):
    rows = [chat(f"Hi {n}?", "Hello") | {"persona": "x", "id": n} for n in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, chat("Hi?", "Hello")])
    cfg = DataConfig(format="chat", path=str(path), cache_dir=str(tmp_path), heldout_fraction=0)
    for hit in (False, True):
        caplog.clear()
        assert load_dataset_for(cfg, tokenizer).cache_hit == hit
        (said,) = caplog.messages
        assert "d.jsonl: chat does not use the fields persona (3 rows)" in said
    with pytest.raises(EagleError, match="3 of 4 rows.*3 x fields that chat does not use: persona"):
        load_dataset_for(cfg.model_copy(update={"strict": True}), tokenizer)
    caplog.clear()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    load_dataset_for(cfg, tokenizer)
    assert any("does not learn to stop" in said for said in caplog.messages)


def test_of_a_turn_that_is_written_anew_only_the_role_and_the_flags_stay(tokenizer):
    tokenizer.chat_template = (layouts.DATA / "templates/qwen3.jinja").read_text("utf-8")
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"from": "human", "value": "Hi?", "id": 1},
        {"from": "gpt", "value": None, "tool_calls": [call]},
        {"from": "tool", "value": "3"},
        {"from": "gpt", "value": "OLD", "reasoning_content": "old", "weight": 1, "score": 2},
    ]
    rewriter = Rewriter(DataConfig(format="chat"), tokenizer)
    (steps,) = rewriter.steps({"conversations": turns, "source": "s"})
    ask = next(steps)
    assert tokenizer.decode(ask.ids).endswith(
        "3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(StopIteration) as done:
        steps.send(Answer("NEW"))
    new = {"from": "gpt", "value": "NEW", "weight": 1}
    kept = [turns[0], turns[1] | {"weight": 0}, turns[2], new]
    assert done.value.value == {"conversations": kept, "source": "s"}
