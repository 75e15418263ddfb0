"""Completions: seeds, slots, stop strings, what is kept and found again, upstream's files."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from configs.fim_tokens import find_fim_tokens
from eagle import EaModel
from eagle.errors import EagleError
from inference.evaluation.generations import (
    TOO_LONG,
    Generations,
    Generator,
    Sample,
    Sampling,
    read_generations,
    write_upstream,
)
from inference.evaluation.problem import Problem, ProblemSet
from inference.generate import load_model

TESTS = json.dumps({"inputs": ["1"], "outputs": ["1"]})
PROMPTS = ["def add(a, b):", "x", "class Point:\n    x = 1\n", "Hello world, how are you?"]
PROBLEMS = [Problem(f"p{i}", prompt, prompt, TESTS) for i, prompt in enumerate(PROMPTS)]
DRAWN = Sampling(engine="eagle", temperature=1.1, top_p=0.95, max_new_tokens=12, tree="8,3,2")


@pytest.fixture(scope="module")
def model(model_folder, head_folder):
    return load_model(str(model_folder), str(head_folder), None, None, "float32", "cpu")


def outputs(found):
    return {(s.task_id, s.sample): s.output for s in found.samples}


def run(model, folder, sampling=DRAWN, n_samples=3, slots=4, problems=PROBLEMS, **more):
    generator = Generator(model, sampling, folder)
    return generator.run(problems, n_samples, slots, **more)


def drawn(**changes):
    return DRAWN.model_copy(update=changes)


def test_neither_slots_company_nor_drafting_change_a_completion(model, tmp_path):
    ours = run(model, tmp_path / "1", slots=1)
    expected = outputs(ours)
    assert len(expected) == 12 and len(set(expected.values())) > 8  # samples differ
    assert outputs(run(model, tmp_path / "5", slots=5)) == expected
    alone = run(model, tmp_path / "alone", n_samples=2, problems=PROBLEMS[2:3])
    assert outputs(alone) == {k: v for k, v in expected.items() if k[0] == "p2" and k[1] < 2}
    plain = run(model, tmp_path, drawn(engine="vanilla"))
    assert outputs(plain) == expected and plain.speed()["tau"] == 1.0
    assert ours.speed()["new_tokens"] == plain.speed()["new_tokens"]


def test_what_is_filled_in_is_asked_for_in_fim_tokens(model, tmp_path):
    problem = replace(PROBLEMS[0], suffix="\n    return 1\n")
    [(request, sample)] = Generator(model, DRAWN, tmp_path).wanted([problem], 1)
    tokens = find_fim_tokens(model.tokenizer)
    assert [i for i in request["input_ids"] if i in tokens[:4]] == [*tokens[:3]]
    assert request["eos_token_id"] >= set(tokens[:4]) and 0 <= sample.seed < 2**63


def test_what_is_there_is_not_made_again(model, tmp_path, monkeypatch):
    asked, taken, real = [], [], EaModel.generate_many

    def count(self, prompts, **options):
        asked.append(len(prompts))
        return real(self, prompts, **options)

    monkeypatch.setattr(EaModel, "generate_many", count)
    first = run(model, tmp_path, n_samples=2)
    again = run(model, tmp_path, n_samples=3, take=lambda sample: taken.append(sample.name))
    assert asked == [8, 4]
    assert sorted(taken) == sorted(outputs(again)) and len(taken) == 12
    assert outputs(first).items() <= outputs(again).items()
    assert outputs(run(model, tmp_path / "fresh", n_samples=3)) == outputs(again)
    # anything else that a completion depends on is another journal, or another key in it
    others = ({}, {"seed": 1}, {"temperature": 0.9}, {"max_new_tokens": 11}, {"tree": "4,2,2"})
    assert len({Generator(model, drawn(**other), tmp_path).path for other in others}) == 5
    changed = [replace(PROBLEMS[0], prompt="def sub(a, b):"), *PROBLEMS[1:]]
    run(model, tmp_path, n_samples=3, problems=changed)
    assert asked == [8, 4, 12, 3]


def test_other_weights_are_another_run(model, tmp_path, model_folder, head_folder, monkeypatch):
    fingerprint = Generator(model, DRAWN, tmp_path).fingerprint
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    other = load_model(str(moved), str(head_folder), None, None, "float32", "cpu")
    assert Generator(other, DRAWN, tmp_path).fingerprint == fingerprint
    for name in ("fingerprint", "adapter", "quantization"):
        with monkeypatch.context() as patch:
            patch.setitem(other.target.identity, name, "another")
            assert Generator(other, DRAWN, tmp_path).fingerprint != fingerprint
    with torch.no_grad():
        other.head.fc.weight[0, 0] += 1
    assert Generator(other, DRAWN, tmp_path).fingerprint != fingerprint
    plain = drawn(engine="vanilla")  # which has no use for the head
    ours, theirs = (Generator(m, plain, tmp_path).fingerprint for m in (model, other))
    assert ours == theirs


def test_stop_strings_end_a_completion(model, tmp_path):
    whole = outputs(run(model, tmp_path, n_samples=1))["p0", 0]
    stop = re.search(r"[ -~]{2}", whole[3:]).group()  # no part of a character
    stopped = [replace(PROBLEMS[0], stops=(stop,))]
    found = run(model, tmp_path, n_samples=1, problems=stopped).samples[0]
    assert found.finish_reason == "stop" and whole.startswith(found.output)
    assert stopped[0].program(found.output) == whole[: whole.index(stop)]
    # in an answer of a chat it may well stand before the program
    chat = run(model, tmp_path, drawn(chat=True), n_samples=1, problems=stopped).samples[0]
    assert chat.chat and chat.finish_reason != "stop"


def test_failures_are_told_and_the_rest_is_kept(model, tmp_path, monkeypatch):
    real = EaModel.generate_many

    def failing(self, prompts, **options):
        prompts[0]["logits_processor"] = lambda ids, scores: 1 / 0
        return real(self, prompts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EaModel, "generate_many", failing)
        with pytest.raises(EagleError, match=r"1 of 4 completions could not .*ZeroDivisionError"):
            run(model, tmp_path, n_samples=1)
    (path,) = tmp_path.glob("generations-*.jsonl")
    assert sum("output" in json.loads(line) for line in path.read_text().splitlines()) == 3
    fresh = outputs(run(model, tmp_path / "x", n_samples=1))
    assert outputs(run(model, tmp_path, n_samples=1)) == fresh


def test_what_cannot_be_done(model, model_folder, tmp_path):
    """A prompt that does not fit is a completion that says so; without a head nothing drafts."""
    long = Problem("long", "word " * 300, "", TESTS)
    found = run(model, tmp_path, n_samples=1, problems=[PROBLEMS[0], long]).by_task()
    assert found["long"][0].finish_reason == TOO_LONG and found["long"][0].output == ""
    assert found["p0"][0].output
    headless = load_model(str(model_folder), None, None, None, "float32", "cpu")
    with pytest.raises(EagleError, match="no draft head"):
        Generator(headless, DRAWN, tmp_path)


SET = ProblemSet(PROBLEMS[:2] + [Problem("7", "seven", "", TESTS, stops=("\nEND",))], "set.jsonl")


def test_upstreams_file_goes_out_and_comes_back(tmp_path):
    samples = [Sample("p0", 1, "b"), Sample("p0", 0, "a"), Sample("7", 0, "x\nEND of it")]
    path = tmp_path / "generations.json"
    write_upstream(path, SET.problems, Generations(samples))
    assert json.loads(path.read_text()) == [
        {"task_id": "p0", "prompt": PROMPTS[0], "output": ["a", "b"]},
        {"task_id": 7, "prompt": "seven", "output": ["x"]},  # a number stays one, and stops are cut
    ]
    found = read_generations(path, SET)
    assert outputs(found) == {("p0", 0): "a", ("p0", 1): "b", ("7", 0): "x"}
    assert found.speed()["tau"] is None and found.speed()["tokens_per_second"] is None


LINE = {"task_id": "p0", "sample": 0, "output": "a"}


@pytest.mark.parametrize(
    "rows, wrong",
    [
        ([{"task_id": "p9", "output": ["a"]}], "1 tasks that set.jsonl does not have: p9"),
        ([{"task_id": 7, "output": ["a"]}, {"task_id": "7", "output": ["a"]}], "task 7 twice"),
        ([{"task_id": 7, "output": "a"}], "0.output"),
        ([{"task_id": 7, "output": ["a"]}, {"output": ["a"]}], "1.task_id"),
        ([], "holds no completions"),
        ({}, "must hold a list"),
        ((LINE, LINE), "completion 0 of task p0 twice"),  # a tuple: lines of a journal
        (({"a": 1},), "no journal"),
        (({"settings": {}},), "no completions"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_refused(tmp_path, rows, wrong):
    path = tmp_path / "generations.json"
    if isinstance(rows, tuple):
        path = tmp_path / "generations-x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif rows is not None:
        path.write_text(json.dumps(rows))
    with pytest.raises(EagleError, match=wrong):
        read_generations(path, SET)
