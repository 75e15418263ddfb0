"""Answers by the target itself: what is asked, what is kept, what a kill or a bad row does."""

import json
import os
import re
import signal
import time

import pytest
from commands import Command
from data_helpers import DATA, REFUSED, chat, read_jsonl, write_jsonl
from head_helpers import config, save_tiny_model, write_fim

from configs.errors import ConfigError
from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from eagle.errors import EagleError
from eagle.model import EaModel
from records import load_dataset_for, load_tokenizer
from records.card import card_path, who_answered
from train.main import run
from train.prepare import __main__ as command_line
from train.prepare import regenerate as work
from train.prepare.answering import Local, Sampling, decode_after
from train.prepare.records import Answer, Rewriter, Task
from train.runs import LOCK, locked

NEW = 12


@pytest.fixture(scope="module")
def model(base):
    return EaModel.from_pretrained(base, dtype="float32")


def settings(data_format, path, **more):
    cache = str(path.parent / "cache")
    return DataConfig(format=data_format, path=str(path), cache_dir=cache, **more)


def write(base, cfg, output, temperatures=(0.0,), seed=0, slots=4, limit=None):
    """Regenerate with the tiny target; returns the card."""
    sampling, files = Sampling(temperatures, max_new_tokens=NEW, seed=seed), work.find_files(cfg)
    engine = Local(sampling, str(base), slots=slots, dtype="float32")
    return work.regenerate(cfg, files, output, engine, limit, quiet=True)


def continued(model, ids, ends=()):
    """What the target says after `ids`, as text without its end."""
    ends = {*model.eos_token_ids, *ends}
    tokens = model.generate([ids], max_new_tokens=NEW, eos_token_id=sorted(ends)).rows[0].tokens
    if tokens[-1] in ends:
        return model.tokenizer.decode(tokens[:-1])
    return model.tokenizer.decode(tokens).rstrip("\ufffd")  # half a character


def answered(model, messages):
    """What the target says as the next turn of a chat."""
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return continued(model, model.tokenizer(text, add_special_tokens=False).input_ids, [end])


def test_each_turn_is_answered_after_the_new_ones(base, model, tmp_path):
    asked = [{"from": "human", "value": "Write a class"}, {"from": "gpt", "value": "OLD"}]
    greeting = {"role": "assistant", "content": "Welcome!"}  # nobody asked for it
    records = [
        chat("Hello", "OLD one", "thanks", "OLD two") | {"source": "a.py"},
        {"conversations": [*asked, {"from": "human", "value": "and then?"}]},
        {"messages": [greeting, *chat("Hi", "OLD")["messages"]]},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    card = write(base, settings("chat", path), tmp_path / "new.jsonl")
    first, second, third = read_jsonl(tmp_path / "new.jsonl")
    said = answered(model, chat("Hello")["messages"])
    again = answered(model, chat("Hello", said, "thanks")["messages"])
    assert first == chat("Hello", said, "thanks", again) | {"source": "a.py"}
    written = {"from": "gpt", "value": answered(model, chat("Write a class")["messages"])}
    assert second["conversations"] == [asked[0], written, records[1]["conversations"][2]]
    start = [greeting, *chat("Hi")["messages"]]
    assert third["messages"] == [*start, {"role": "assistant", "content": answered(model, start)}]
    counts = card["counts"]
    assert (counts["records"], counts["written"], counts["answers"]) == (3, 3, 4)
    cfg = settings("chat", tmp_path / "new.jsonl", heldout_fraction=0)
    data = load_dataset_for(cfg, model.tokenizer)
    assert len(data) == 3 and not data.bad_rows


@pytest.mark.parametrize("template", ["auto", "alpaca"])
def test_instructions(base, model, tmp_path, template):
    record = {"instruction": "Write a function", "input": "add", "response": "OLD"}
    path = write_jsonl(tmp_path / "instruction.jsonl", [record])
    cfg = settings("instruction", path, instruction_template=template)
    write(base, cfg, tmp_path / "new.jsonl")
    text = (
        "Below is an instruction that describes a task, paired with an input that gives it "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWrite a function\n\n### Input:\nadd\n\n### Response:\n"
    )
    if template == "auto":
        said = answered(model, chat("Write a function\n\nadd")["messages"])
    else:
        said = continued(model, model.tokenizer(text, add_special_tokens=False).input_ids)
    assert read_jsonl(tmp_path / "new.jsonl") == [record | {"response": said}]


def test_middles_and_whole_files(base, model, tmp_path):
    code = "".join(f"def add_{i}(a, b):\n    return a + b\n\n" for i in range(6))
    record = {"prefix": "def add(a, b):\n", "middle": "OLD", "suffix": "\n\nclass Point:\n"}
    path = write_jsonl(tmp_path / "fim.jsonl", [record, {"text": code, "source": "add.py"}])
    write(base, settings("fim", path, fim_spans_per_file=3), tmp_path / "new.jsonl")
    first, *cuts = read_jsonl(tmp_path / "new.jsonl")
    fim, tokenizer = find_fim_tokens(model.tokenizer), model.tokenizer
    parts = (tokenizer(record[name], add_special_tokens=False) for name in ("prefix", "suffix"))
    before, after = (part.input_ids for part in parts)
    prompt = [fim.prefix, *before, fim.suffix, *after, fim.middle]
    assert first == record | {"middle": continued(model, prompt, fim[:4])}
    assert len(cuts) == 3
    for row in cuts:
        assert code.startswith(row["prefix"]) and code.endswith(row["suffix"]) and "text" not in row
        assert row["source"] == "add.py" and row["middle"]


def test_tokens_in_tokens_out(base, model, tmp_path):
    records = [{"input_ids": [9, 8, 7, 6], "loss_mask": [0, 0, 0, 1]}, {"input_ids": [9, 8, 7, 6]}]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    write(base, settings("tokenized", path), tmp_path / "new.jsonl")
    found = read_jsonl(tmp_path / "new.jsonl")
    for row, prompt in zip(found, ([9, 8, 7], [9, 8, 7, 6]), strict=True):
        new = model.generate([prompt], max_new_tokens=NEW).rows[0].tokens
        assert row == {"input_ids": prompt + new, "loss_mask": [0] * len(prompt) + [1] * len(new)}


def test_output_depends_on_seed_and_record_alone(base, tmp_path):
    """Neither the number of slots nor where a run was cut changes a token (fp32)."""
    path = tmp_path / "fim.jsonl"
    write_fim(path, rows=20)
    cfg = settings("fim", path)
    outputs = []
    for name, seed, slots in (("a", 3, 4), ("b", 3, 1), ("c", 4, 4)):
        write(base, cfg, tmp_path / f"{name}.jsonl", (0.0, 1.0), seed, slots)
        outputs.append(read_jsonl(tmp_path / f"{name}.jsonl"))
    assert outputs[0] == outputs[1]
    changed = [a != c for a, c in zip(outputs[0], outputs[2], strict=True)]
    assert not any(changed[::2]) and all(changed[1::2])  # temperatures take turns: 0, 1, 0, 1 …
    first = write(base, cfg, tmp_path / "d.jsonl", (0.0, 1.0), 3, limit=3)
    assert first["counts"]["records"] == 3 and read_jsonl(tmp_path / "d.jsonl") == outputs[0][:3]


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_file(base, tmp_path):
    path, output = tmp_path / "fim.jsonl", tmp_path / "killed.jsonl"
    write_fim(path, rows=60)
    whole = write(base, settings("fim", path), tmp_path / "whole.jsonl", (0.0, 1.0))
    given = f"--base {base} --data {path} --data_format fim --output {output} --slots 1"
    given += f" --temperature 0,1 --max_new_tokens {NEW} --dtype float32"
    command = ["train.prepare", "regenerate", *given.split()]
    process, deadline = Command(*command), time.monotonic() + 100
    journal = output.with_suffix(".journal")
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    assert process.kill() == -signal.SIGKILL, "it was done before the kill"
    assert not output.exists() and not card_path(output).exists()
    with open(journal, "ab") as file:
        file.write(b'[[59, 0, 0], {"text": "torn by the')
    done = Command(*command).output()
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    card = json.loads(card_path(output).read_text())
    assert card["complete"] and all(card[key] == whole[key] for key in ("counts", "sha256"))
    assert "ETA" in done.stderr and f"{card['counts']['written']} of 60 records" in done.stdout
    before = output.stat().st_mtime_ns
    assert write(base, settings("fim", path), output, (0.0, 1.0)) == card  # nothing is left to do
    assert output.stat().st_mtime_ns == before


def test_no_answer_is_asked_for_twice(base, tmp_path, monkeypatch):
    """Each is kept when it is there, those of a chat's first turns too, whatever ends the run; the
    rate is told while the first one grows."""
    chats = [chat(f"Hello {i}", "x", "add", "y") for i in range(6)]
    path = write_jsonl(tmp_path / "chat.jsonl", chats)
    cfg, output, journal = settings("chat", path), tmp_path / "new.jsonl", tmp_path / "new.journal"
    write(base, cfg, tmp_path / "whole.jsonl", (0.0, 1.0))
    answer, progress, asked = Local._answer, [], []

    def count(self, ask, *more):
        if failure := failures.pop(len(asked), None):
            raise failure
        asked.append(tuple(ask.ids))
        return answer(self, ask, *more)

    monkeypatch.setattr(Local, "_answer", count)
    note = lambda self, things, amount=0: progress.append((things, amount))  # noqa: E731
    monkeypatch.setattr(work.Meter, "add", note)
    said = "new.journal: No space left on device; make room, and run the same"
    full = OSError(28, "No space left on device", str(journal))
    failures = {2: KeyboardInterrupt(said), 8: full}
    for kept, seen in ((2, KeyboardInterrupt), (8, EagleError)):
        with pytest.raises(seen, match=said):
            write(base, cfg, output, (0.0, 1.0))
        assert len(read_jsonl(journal)) == 1 + kept and not output.exists()
        with journal.open("a") as file:
            file.write('[[3, 0, 0], {"text": "cut by the k')
    things, tokens = next(told for told in progress if told[1])
    assert things == 0 < tokens < NEW
    write(base, cfg, output, (0.0, 1.0))
    assert len(asked) == len(set(asked)) == 12 and not journal.exists()
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_failures_are_listed_and_the_others_go_on(base, tmp_path):
    long = " ".join(["class"] * 400)
    good = [chat(text, "x") for text in ("Hello", "add", long)]
    records = [good[0], "{no json", {"text": "no chat"}, good[2], good[1]]
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    card = write(base, settings("chat", path), tmp_path / "new.jsonl")
    assert card["counts"]["written"] == 2 and card["counts"]["failed"] == 3
    bad = {row["line"]: row for row in read_jsonl(tmp_path / "new.quarantine.jsonl")}
    assert bad.keys() == {2, 3, 4}
    assert "malformed JSON" in bad[2]["message"] and "missing field 'messages'" in bad[3]["message"]
    assert "prompt has" in bad[4]["message"] and bad[4]["where"] == f"{path}:4"
    # beside the data they are not data
    cfg = settings("chat", tmp_path, max_bad_fraction=1)
    data = load_dataset_for(cfg, load_tokenizer(str(base)))
    assert {p.name for p in data.paths} == {"chat.jsonl", "new.jsonl"}


def test_too_many_failures_end_the_run(base, tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [chat("Hello", "x"), *["{"] * 3])
    given = {"base": str(base), "dtype": "float32", "data": str(path), "data_format": "chat"}
    for command, name in ((command_line.regenerate, ".new.jsonl"), (command_line.features, "new/")):
        held = locked(tmp_path / f"{name}{LOCK}", path)
        with held, pytest.raises(EagleError, match="is being written by process"):
            command(data=str(path), data_format="chat", output=str(tmp_path / name.strip("./")))
    said = "3 of 4 records got no answer, more than data.max_bad_fraction=0.05"
    with pytest.raises(ConfigError, match=said):
        command_line.regenerate(**given, output=str(tmp_path / "new.jsonl"), max_new_tokens=4)
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "no chat"}] * 40)
    said = "the first 32 records got no answer: 32 x missing field 'messages'"
    with pytest.raises(EagleError, match=said):
        write(base, settings("chat", path), tmp_path / "bad_new.jsonl")


def test_what_does_not_belong_together_is_refused(base, tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "chat.jsonl", [chat("Hello", "x")] * 3)
    cfg, output = settings("chat", path), tmp_path / "new.jsonl"
    write(base, cfg, output)
    other = tmp_path / "other"
    save_tiny_model(other, tokenizer_dir, seed=5)
    (tmp_path / "mine.jsonl").write_text("precious\n")
    plain = settings("plain", path)
    for error, arguments in {
        "begun with sampling=.*choose another --output": (base, cfg, output, (0.0,), 1),
        "begun with target=": (other, cfg, output),
        "exists and mine.card.json is not its card": (base, cfg, tmp_path / "mine.jsonl"),
        "name a .jsonl file": (base, cfg, tmp_path / "new.txt"),
        "plain has no answers to write": (base, plain, tmp_path / "plain.jsonl"),
    }.items():
        with pytest.raises(EagleError, match=error):
            write(*arguments)
    os.truncate(output, 10)
    with pytest.raises(EagleError, match="new.card.json is not its card"):
        write(base, cfg, output)


@pytest.mark.parametrize("arguments, named", REFUSED["regenerate"])
def test_wrong_arguments_are_told_before_anything_is_written(tmp_path, arguments, named):
    given = {"data_format": "chat", "output": str(tmp_path / "new.jsonl")} | arguments
    with pytest.raises((ConfigError, EagleError), match=re.escape(named)):
        command_line.regenerate(**given)
    assert not list(tmp_path.iterdir())


def test_a_card_says_who_answered_and_so_does_a_head(base, tmp_path, caplog):
    data, own = tmp_path / "fim.jsonl", tmp_path / "own.jsonl"
    write_fim(data, rows=30)
    writer = write(base, settings("fim", data), own)["target"]
    assert run(config(base, own, tmp_path / "run", max_steps=1), quiet=True) == 0
    recorded = json.loads((tmp_path / "run" / "head" / "eagle.json").read_text())
    assert recorded["data"]["answers"] == "written by the target"
    caplog.clear()
    mine, other = (writer["fingerprint"], writer["adapter"]), ("2:ff", None)
    assert who_answered([own, data], None, *mine) == (
        "own.jsonl: written by the target; fim.jsonl: as in the data"
    )
    assert not caplog.records
    for target in (other, (mine[0], "an adapter")):
        assert "another target" in who_answered([own], None, *target)
        assert "written by another target" in caplog.records[-1].getMessage()
    caplog.clear()
    # the user knows better
    assert who_answered([own], True, *other) == "written by the target"
    assert who_answered([own], False, *mine) == "as in the data" and not caplog.records
    card = card_path(own).read_text()
    card_path(own).write_text(card.replace(mine[0], "f" * 64))  # an earlier version's
    assert who_answered([own], None, *mine).endswith("not compared")
    card_path(own).write_text(card)
    own.write_text(own.read_text() + own.read_text().splitlines()[0] + "\n")
    assert who_answered([own], None, *mine) == "as in the data"
    assert "has changed since its card" in caplog.records[-1].getMessage()
    card_path(own).write_text("{")
    with pytest.raises(EagleError, match="not a readable data card"):
        who_answered([own], None, *mine)


def test_a_blank_before_the_first_word_is_kept():
    """SentencePiece drops it from a text that is decoded alone."""

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(["", " def", " add", "\ufffd"][i] for i in ids).lstrip(" ")

    assert decode_after(Tokenizer(), [1], [2], cut=False) == " add"
    assert decode_after(Tokenizer(), [], [2], cut=False) == "add"
    assert decode_after(Tokenizer(), [1], [2, 3], cut=True) == " add"
    assert decode_after(Tokenizer(), [1], [2, 3], cut=False) == " add\ufffd"


def test_reasoning_that_the_template_opens_belongs_to_the_answer(base, tmp_path, tokenizer):
    opened = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.chat_template = (DATA / "templates/qwen3.jinja").read_text("utf-8") + opened
    rewriter = Rewriter(DataConfig(format="chat"), tokenizer)
    (steps,) = rewriter.steps(chat("Hello", "OLD"))
    task = Task(None, 0, 0, steps)
    task.take(None)
    assert task.ask.opened == "<think>\n"
    task.take(Answer(task.ask.opened + "reason\n</think>\n\nWorld", [5], 1))
    assert task.ask is None
    rewriter.check(task)
