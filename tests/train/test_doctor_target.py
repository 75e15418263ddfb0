"""Each finding of the doctor about a target, its tokenizer, a head or data is met by what it is
there to find.
"""

import json
import logging

import pytest
import torch
from data_helpers import REWRITING, chat, write_jsonl
from head_helpers import save_tiny_model, tiny_head, write_fim

from configs.schema import HeadTrainConfig
from eagle.checkpoint import save_head
from train.checks import data as checks
from train.checks import model as targets
from train.checks.findings import guarded

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def quiet():
    """As the command does: what the loader warns about are findings."""
    logger = logging.getLogger("records")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def shared_base(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir)
    return folder


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A copy that a test may break."""
    save_tiny_model(tmp_path / "base", tokenizer_dir)
    return tmp_path / "base"


def edit(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(base, **sections):
    return HeadTrainConfig.model_validate(
        {"model": {"base": str(base), "dtype": "float32", **sections.pop("model", {})}, **sections}
    )


def look(cfg, formats=(), head=None):
    """(subject, findings) of the target's part."""
    subject = targets.Subject(str(cfg.model.base))
    found = list(targets.target(subject, cfg))
    found += guarded("tokenizer", lambda: targets.tokens(subject, cfg, set(formats)))
    if head is not None:
        found += guarded("head", lambda: targets.head(subject, str(head)))
    return subject, found


def only(findings, level, text):
    found = [f for f in findings if f.level == level and text in f.text]
    assert len(found) == 1, [vars(f) for f in findings]
    return found[0]


def test_a_fit_target(shared_base):
    subject, found = look(config(shared_base), {"fim"})
    only(found, "ok", "its logits through our attention are the stock model's")
    assert {f.level for f in found} == {"ok"} and subject.target is not None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "t5"}, "not causal language models"),
        ({"model_type": "no-such-model"}, "no model config"),
        ({"model_type": "mpt", "n_layers": 2, "d_model": 64, "n_heads": 4}, "ALiBi"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "no model config"),
        ({"model_type": "llama", "hidden_act": "sine"}, "makes no 'llama' model: 'sine'"),
    ],
)
def test_unfit_targets(tmp_path, values, text):
    (tmp_path / "config.json").write_text(json.dumps(values))
    subject = targets.Subject("x")
    [found] = targets.target(subject, config(tmp_path))
    assert found.level == "problem" and text in found.text and subject.model is None


def test_a_folder_without_a_model(tmp_path):
    [found] = targets.target(targets.Subject("x"), config(tmp_path / "none"))
    assert found.level == "problem" and "config.json and weights" in found.remedy


def test_damaged_weights(base):
    (base / "model.safetensors").write_bytes(b"12345678")
    only(look(config(base))[1], "problem", "cannot load the target model")


def test_a_large_target_is_judged_without_its_weights(shared_base, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "SMALL", 1000)
    subject, found = look(config(shared_base))
    only(found, "note", "logits were not compared")
    assert subject.target is None and subject.vocab_size > 300
    save_head(tiny_head(vocab=60), tmp_path / "head")
    only(look(config(shared_base), head=tmp_path / "head")[1], "problem", "its vocabulary is 60")


def test_bytes_of_the_weights(shared_base):
    subject, _ = look(config(shared_base))
    count = sum(p.numel() for p in subject.model.parameters())
    assert subject.weight_bytes == 4 * count
    assert targets.weight_bytes(shared_base, subject.model, "auto") == pytest.approx(
        4 * count, rel=0.02
    )
    assert targets.weight_bytes("hub/id", subject.model, "bfloat16") == 2 * count


# tokenizer


def test_a_tokenizer_with_more_ids_than_the_model(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.save_pretrained(base)
    assert (
        "resize its embeddings" in only(look(config(base))[1], "problem", "the model only").remedy
    )


def end_token_of(base, token):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(base)


def test_end_tokens(base):
    end_token_of(base, "<|im_end|>")
    found = look(config(base))[1]
    told = only(found, "warning", "'<|im_end|>'")
    assert "not among the model's end tokens ['<|endoftext|>']" in told.text
    for file in ("config.json", "generation_config.json"):
        edit(base / file, eos_token_id=None)
    only(look(config(base))[1], "warning", "names none")
    end_token_of(base, None)
    only(look(config(base))[1], "problem", "the tokenizer has none, so supervised rows end without")


def test_an_end_token_outside_the_model(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.add_special_tokens({"eos_token": "<the end>"})
    tokenizer.save_pretrained(base)
    only(look(config(base))[1], "problem", "'<the end>' has id")


def test_pad_tokens(base):
    from transformers import AutoTokenizer

    for pad, level, text in (
        ("<|endoftext|>", "ok", "end token too"),
        (None, "note", "the tokenizer has none"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(base)
        found = [f for f in look(config(base))[1] if f.check == "pad token"]
        assert [f.level for f in found] == [level] and text in found[0].text


def test_fim_tokens(base, shared_base):
    edit(base / "generation_config.json", eos_token_id=5)
    told = only(look(config(base), {"fim"})[1], "warning", "does not stop the model")
    assert "eos_token_id" in told.remedy
    given = {
        "data": {"fim_tokens": {"prefix": "<P>", "suffix": "<S>", "middle": "<M>", "eot": "<E>"}}
    }
    for formats, level in (({"fim"}, "problem"), ({"chat"}, "note")):
        found = look(config(shared_base, **given), formats)[1]
        assert [f.level for f in found if f.check == "fim tokens"] == [level]


def test_chat_data_and_no_template(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    told = only(look(config(base), {"chat"})[1], "problem", "the data is chat")
    assert "data.format=instruction" in told.remedy


# a head


def test_heads(shared_base, tmp_path):
    subject, _ = look(config(shared_base))
    head = tiny_head(hidden=32, vocab=subject.vocab_size, draft=64)
    save_head(head, tmp_path / "fits", {"training": {"step": 7}})
    subject, found = look(config(shared_base), head=tmp_path / "fits")
    only(found, "ok", "draft vocabulary 64, trained for 7 steps")
    assert subject.head_config(config(shared_base)).draft_vocab_size == 64
    save_head(head, tmp_path / "foreign", {"target": {"fingerprint": "0" * 64, "id": "other"}})
    only(look(config(shared_base), head=tmp_path / "foreign")[1], "warning", "trained on other")
    only(look(config(shared_base), head=tmp_path / "none")[1], "problem", "no head folder")


# data


def examine(cfg, subject=None):
    """Findings of the data's part."""
    if subject is None:
        subject, _ = look(cfg)
    with checks.samples(cfg.data, subject.tokenizer) as (sampled, found):
        for sample in sampled:
            found += checks.check(sample, subject, cfg)
        if sampled:
            found += checks.vocabulary(sampled, subject, cfg)
    return found


def of_format(base, path, data_format, **data):
    cfg = {"format": data_format, "path": str(path), "min_supervised_tokens": 1, **data}
    return config(base, data=cfg, model={"draft_vocab_size": 300})


def test_good_data(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    found = examine(of_format(shared_base, tmp_path / "d.jsonl", "fim"))
    assert {f.level for f in found} == {"ok"}, found
    only(found, "ok", "all 80 records give 80 rows")
    only(found, "ok", "100% of the answers end with a token that stops the model")


def test_a_template_that_rewrites_or_drops_turns(base, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("a", "b", "c", "d")] * 3)
    only_last = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    for template, reason in ((REWRITING, "rewrites"), (only_last, "drops")):
        (base / "chat_template.jinja").write_text(template)
        told = only(examine(of_format(base, path, "chat")), "problem", "all 3 rows are unusable")
        assert reason in told.text and f"{path}:1" in told.text and "eagle-doctor-" not in told.text


def test_fim_data_and_a_tokenizer_without_its_tokens(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    tokens = {"prefix": "<P>", "suffix": "<S>", "middle": "<M>", "eot": "<E>"}
    found = examine(of_format(shared_base, tmp_path / "d.jsonl", "fim", fim_tokens=tokens))
    assert [f.level for f in found] == ["problem"] and "'<P>', '<S>', '<M>', '<E>'" in found[0].text


def test_a_source_that_breaks_in_an_unforeseen_way(shared_base, tmp_path, monkeypatch):
    def broken(*arguments):
        raise MemoryError("of the loader")

    write_fim(tmp_path / "d.jsonl")
    monkeypatch.setattr(checks, "load_dataset_for", broken)
    [told] = examine(of_format(shared_base, tmp_path / "d.jsonl", "fim"))
    assert told.level == "problem" and "MemoryError: of the loader" in told.text


def test_data_that_is_all_masked(shared_base, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}] * 4)
    told = only(examine(of_format(shared_base, path, "tokenized")), "problem", "all-zero loss mask")
    assert told.text.startswith("tokenized: all 4 rows are unusable")


def test_bad_rows_are_told_by_reason_with_their_place(shared_base, tmp_path):
    good = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}] * 40
    path = write_jsonl(
        tmp_path / "d.jsonl", [*good, "", "{", {"input_ids": [5, 6], "loss_mask": [0, 0]}]
    )
    found = examine(of_format(shared_base, path, "tokenized"))
    assert f"{path}:42: malformed JSON" in only(found, "warning", "malformed JSON").text
    assert "check loss_mask/labels" in only(found, "warning", "all-zero loss mask").remedy
    found = examine(of_format(shared_base, path, "tokenized", max_bad_fraction=0.01))
    assert len([f for f in found if f.level == "problem"]) == 2
    path.write_bytes(path.read_bytes() + b'{"input_ids": "\xff"}\n')
    found = examine(of_format(shared_base, path, "tokenized", max_bad_fraction=0.5))
    only(found, "warning", f"{path}:44: not UTF-8")


def test_rows_that_are_cut_and_masks_that_are_odd(shared_base, tmp_path):
    rows = [{"input_ids": [5] * 30, "loss_mask": [0] + [1] * 29}] * 9
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    found = examine(of_format(shared_base, path, "tokenized", max_length=16))
    assert "raise data.max_length" in only(found, "warning", "9 of 9 rows are cut").remedy
    path = write_jsonl(
        tmp_path / "e.jsonl", [{"input_ids": [5] * 99, "loss_mask": [0] * 98 + [1]}] * 9
    )
    only(examine(of_format(shared_base, path, "tokenized")), "warning", "1.0% supervised")
    found = examine(of_format(shared_base, path, "tokenized", min_supervised_tokens=100))
    assert "add data" in only(found, "problem", "9 supervised tokens are too few").remedy
    long = {"prefix": "a", "suffix": "", "middle": "def " * 90}
    path = write_jsonl(tmp_path / "f.jsonl", [long] * 9)
    only(examine(of_format(shared_base, path, "fim")), "warning", "supervised")


def test_answers_that_do_not_stop_the_model(base, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Hi?", "Yes."), chat("Ho?", "No.")] * 5)
    (base / "chat_template.jinja").write_text(CHATML)
    told = only(examine(of_format(base, path, "chat")), "warning", "'<|im_end|>'")
    assert "10 of 10 answers end with" in told.text and "to eos_token_id" in told.remedy
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    told = only(examine(of_format(base, path, "chat")), "warning", "end without an end token")
    assert "chat template" in told.remedy


def test_draft_vocabularies(shared_base, tmp_path):
    rng = torch.Generator().manual_seed(0)

    def rows(count, low, high):
        ids = [torch.randint(low, high, (40,), generator=rng).tolist() for _ in range(count)]
        return [{"input_ids": i, "loss_mask": [0] + [1] * 39} for i in ids]

    def found(size, records):
        path = write_jsonl(tmp_path / "d.jsonl", records)
        cfg = of_format(shared_base, path, "tokenized")
        cfg = cfg.model_copy(
            update={"model": cfg.model.model_copy(update={"draft_vocab_size": size})}
        )
        return [f for f in examine(cfg) if f.check == "draft vocabulary"]

    [told] = found(300, rows(200, 20, 360))
    assert told.level == "warning" and told.remedy == "raise model.draft_vocab_size"
    [told] = found(60, rows(200, 20, 360))
    assert told.level == "problem"
    [told] = found(300, rows(9, 20, 360))
    assert told.level == "note" and "few rows" in told.text
    [told] = found(5, rows(200, 20, 360))
    assert told.level == "problem" and "special tokens" in told.text
    [told] = found(300, rows(200, 20, 250))
    assert told.level == "ok"


def test_the_vocabulary_of_a_head_that_is_given(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    cfg = of_format(shared_base, tmp_path / "d.jsonl", "fim")
    subject, _ = look(cfg)
    save_head(tiny_head(hidden=32, vocab=subject.vocab_size, draft=8), tmp_path / "head")
    subject, _ = look(cfg, head=tmp_path / "head")
    [told] = [f for f in examine(cfg, subject) if f.check == "draft vocabulary"]
    assert told.level == "problem" and "the head's 8 of" in told.text


def test_only_the_first_records_of_a_large_file_are_read(shared_base, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "RECORDS", 20)
    write_fim(tmp_path / "d.jsonl")
    cfg = of_format(shared_base, tmp_path / "d.jsonl", "fim")
    only(examine(cfg), "ok", "the first 20 records give 20 rows")
    subject, _ = look(cfg)
    with checks.samples(cfg.data, subject.tokenizer) as ([sample], _):
        assert sample.share == pytest.approx(0.25, rel=0.2)


def test_mixtures_and_files_that_are_not_there(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    mixture = [
        {"format": "fim", "path": str(tmp_path / "d.jsonl"), "name": "code"},
        {"format": "chat", "path": str(tmp_path / "no.jsonl")},
    ]
    cfg = config(
        shared_base, data={"format": "mixed", "mixture": mixture}, model={"draft_vocab_size": 300}
    )
    assert checks.formats(cfg.data) == {"fim", "chat"}
    found = examine(cfg)
    only(found, "ok", "code: all 80 records")
    assert "no such data file" in only(found, "problem", "chat: ").text
    assert checks.formats(HeadTrainConfig.model_validate({"data": {"format": "mixed"}}).data) == {
        "chat",
        "fim",
        "instruction",
    }
    absent = config(
        shared_base,
        data={"path": str(tmp_path / "d.jsonl"), "eval_path": str(tmp_path / "no.jsonl")},
    )
    [told] = guarded("data", lambda: checks.held_out_files(absent.data))
    assert told.level == "problem" and "no such data file" in told.text
