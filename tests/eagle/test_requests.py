"""Many requests over few slots: each is served as if it were alone, and none can harm another."""

import itertools
import re

import pytest
import torch
from engine_helpers import (
    ScriptedDrafter,
    head_model,
    make_prompts,
    make_tokenizer,
    new_tokens,
    plain,
)
from transformers import GenerationConfig, TextStreamer

from eagle.errors import EagleError
from eagle.model import EaModel

LENGTHS = (9, 3, 14, 1, 6, 22, 2, 11, 5, 1, 17, 8, 4)
PROMPTS = make_prompts(LENGTHS)
NEW = 16
SAMPLED = {"temperature": 1.3, "top_p": 0.95, "seed": 70}


def tokens(rows):
    return [row.tokens for row in rows]


def alone(model, requests, **options):
    """Each request in a call of its own."""
    out = []
    for request in requests:
        own = {**request} if isinstance(request, dict) else {"input_ids": request}
        prompt = own.pop("input_ids")
        if "generation_config" not in own:  # which is nearer than the options of the call
            own = {**options, **own}
        out += new_tokens(model.generate([prompt], **own))
    return out


@pytest.fixture(scope="module")
def model(llama):
    return head_model(llama, "8,4,2", draft_vocab=128)


@pytest.fixture(scope="module")
def answers(llama):
    return plain(llama, PROMPTS, max_new_tokens=NEW)


class Broken:
    def get_vocab(self):
        raise RuntimeError("no such piece")


def broken_processor(after):
    """Works until the context is longer than `after` tokens."""

    def process(ids, scores):
        if ids.shape[1] > after:
            raise RuntimeError("out of ideas")
        return scores

    return process


MANY = [("llama", SAMPLED, True, 3), ("gemma2", {}, True, 3), ("gemma2", SAMPLED, False, 3)]
MANY += [("llama", {}, True, slots) for slots in (1, 5, 40)]


@pytest.mark.parametrize("family, sampling, draft, slots", MANY)
def test_more_requests_than_slots(targets, family, sampling, draft, slots):
    model = head_model(targets(family), "8,4,2", draft_vocab=128)
    rows = model.generate_many(PROMPTS, slots=slots, max_new_tokens=NEW, draft=draft, **sampling)
    assert len({tuple(t) for t in tokens(rows)}) == len(PROMPTS)
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        own = {**sampling, "seed": 70 + i} if sampling else {}
        one = model.generate([prompt], max_new_tokens=NEW, draft=False, **own).rows[0]
        assert row.tokens == one.tokens and row.prompt == prompt
        assert row.finish_reason == "length" and row.error is None


def test_a_seed_for_each_request(model):
    seeds = [2**62, 5, -7, 8, 9]
    prompts = PROMPTS[:5]
    options = dict(max_new_tokens=NEW, temperature=1.3)
    many = tokens(model.generate_many(prompts, slots=2, seed=seeds, **options))
    own = [{"input_ids": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
    assert many == tokens(model.generate_many(own, slots=3, seed=1, **options))
    assert many == alone(model, own, **options)
    # a request without a seed of its own has the call's
    own[1].pop("seed"), own[2].update(seed=None)
    mixed = tokens(model.generate_many(own, slots=3, seed=1, **options))
    expected = [{**own[1], "seed": 2}, {**own[2], "seed": 3}]
    assert mixed == [many[0], *alone(model, expected, **options), *many[3:]]


def test_short_ones_come_first_and_free_slots_are_filled_at_once(llama, answers):
    """Two slots serve the 12 short requests, 3 cycles each, beside the long one's 15."""
    limits, cycles = [16, 4, 3, 4, 1, 3, 4, 2, 4, 3, 2, 4, 4], []
    requests = [{"input_ids": p, "max_new_tokens": n} for p, n in zip(PROMPTS, limits, strict=True)]
    options = dict(slots=3, as_completed=True, on_cache=lambda cache, _: cycles.append(cache.order))
    seen = list(EaModel(llama).generate_many(requests, **options))
    place = {i: n for n, (i, _) in enumerate(seen)}
    assert sorted(place) == list(range(13))
    assert all(row.done and row.tokens == answers[i][: limits[i]] for i, row in seen)
    assert place[2] == 0 and place[1] < place[5] < place[0]
    assert len(cycles) == 15 and all(len(order) == 3 for order in cycles[:11])


def test_drafts_that_are_always_right_in_refilled_slots(llama, answers):
    """The scripted drafter knows one answer a slot."""
    prompt, answer = PROMPTS[0], answers[0]
    drafter = ScriptedDrafter([answer], True, "6,4,1")
    rows = EaModel(llama, drafter=drafter).generate_many([prompt] * 4, slots=1, max_new_tokens=NEW)
    assert tokens(rows) == [answer] * 4
    assert all(row.cycles == 3 and row.tau == 5 for row in rows)  # 1 + 3 cycles of 5


def test_options_of_a_requests_own(llama, model):
    model = head_model(llama, "8,4,2", draft_vocab=128)
    model._tokenizer = text = make_tokenizer()
    plain_answers = plain(llama, PROMPTS, max_new_tokens=30)
    banned = plain_answers[8][2]
    own = {
        1: {"temperature": 1.3, "seed": 5},
        2: {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 6},
        3: {"max_new_tokens": 4},
        4: {"stop_strings": text.decode(plain_answers[4])[6:9]},
        5: {"do_sample": True, "seed": 9},
        6: {"eos_token_id": plain_answers[6][5]},
        8: {"logits_processor": lambda ids, s: s.index_fill(-1, torch.tensor(banned), -1e9)},
        9: {"repetition_penalty": 1.6, "logprobs": True},
        10: {"max_length": len(PROMPTS[10]) + 7},
        11: {"generation_config": GenerationConfig(max_new_tokens=9, no_repeat_ngram_size=2)},
    }
    requests = [{"input_ids": p, **own.get(i, {})} for i, p in enumerate(PROMPTS)]
    rows = model.generate_many(requests, slots=4, max_new_tokens=30)
    assert tokens(rows) == alone(model, requests, max_new_tokens=30)
    changed = {i for i, row in enumerate(rows) if row.tokens != plain_answers[i]}
    assert changed - set(own) == set() and changed >= {1, 2, 3, 4, 5, 6, 8, 10}
    assert [len(rows[i].tokens) for i in (3, 10)] == [4, 7]
    assert rows[4].finish_reason == "stop" and rows[6].finish_reason == "eos"
    assert banned not in rows[8].tokens
    assert len(rows[9].logprobs) == 30 and not rows[0].logprobs


def test_a_requests_options_win_over_the_calls(model):
    expected = alone(model, PROMPTS[:2], max_new_tokens=8)
    expected += alone(model, PROMPTS[2:3], max_new_tokens=8, temperature=1.3, seed=5)
    own = [{"input_ids": PROMPTS[0], "temperature": 0.0}]
    own += [{"input_ids": PROMPTS[1], "do_sample": False}, PROMPTS[2]]
    for common in (
        {"temperature": 1.3},
        {"do_sample": True, "temperature": 1.3},
        {"generation_config": GenerationConfig(do_sample=True, temperature=1.3, top_k=0)},
    ):
        rows = model.generate_many(own, slots=2, seed=3, max_new_tokens=8, **common)
        assert tokens(rows) == expected


def test_prompts_in_any_form(model, answers):
    some, expected = PROMPTS[:3], [a[:5] for a in answers[:3]]
    for prompts in (
        (torch.tensor(p) for p in some),
        iter([{"input_ids": p} for p in some]),
        tuple(map(tuple, some)),
        [some[0], {"input_ids": torch.tensor(some[1])}, some[2]],
    ):
        assert tokens(model.generate_many(prompts, slots=2, max_new_tokens=5)) == expected


def test_cancelling_a_row(model, answers):
    """Row 1, and row 4 that waited for a slot, are given up when they show their first tokens."""
    got, last, done = {}, {}, []
    for span in model.stream(PROMPTS, slots=3, max_new_tokens=NEW):
        got[span.index] = got.get(span.index, []) + span.tokens
        last[span.index] = span.row
        done += [span.index] * span.row.done
        if span.index in (1, 4):
            span.row.cancel()
    for i, answer in enumerate(answers):
        gone = i in (1, 4)
        assert got[i] == last[i].tokens == (answer[:1] if gone else answer)
        assert last[i].finish_reason == ("cancelled" if gone else "length")
    assert sorted(done) == list(range(len(PROMPTS)))  # each row says once that it is done


def test_cancelling_frees_the_slot(llama):
    requests = [{"input_ids": p, "max_new_tokens": 40} for p in PROMPTS[:3]]
    requests += [{"input_ids": p, "max_new_tokens": 4} for p in PROMPTS[3:6]]
    order = []
    for span in EaModel(llama).stream(requests, slots=3):
        order += [span.index] * span.row.done
        if span.index == 1:
            span.row.cancel()
    # the waiting ones all went through the slot of row 1, long before the other long ones ended
    assert order == [1, 3, 4, 5, 0, 2]
    spans = []
    for span in EaModel(llama).stream(PROMPTS[:1], max_new_tokens=NEW):
        spans.append(span)
        span.row.cancel()
    assert [len(s.tokens) for s in spans] == [1, 0]  # the second says that it is done
    row = EaModel(llama).generate_many(PROMPTS[:1], max_new_tokens=3)[0]
    row.cancel()
    assert row.finish_reason == "length"


def test_closing_a_stream(model, answers):
    stream = model.stream(PROMPTS, slots=3, max_new_tokens=NEW)
    for _ in range(7):
        next(stream)
    stream.close()
    assert list(stream) == []
    assert tokens(model.generate_many(PROMPTS, slots=3, max_new_tokens=NEW)) == answers
    for _ in model.stream(PROMPTS[:4], max_new_tokens=NEW):
        break
    assert torch.is_inference_mode_enabled() is False
    assert new_tokens(model.generate(PROMPTS, max_new_tokens=NEW)) == answers


def test_two_live_streams_of_one_model(model, answers):
    how = [dict(slots=3, tree="16,4,4"), dict(slots=3, draft=False)]
    streams = [model.stream(PROMPTS, max_new_tokens=NEW, **options) for options in how]
    got = [{}, {}]
    for spans in itertools.zip_longest(*streams):
        for text, span in zip(got, spans, strict=True):
            if span is not None:
                text.setdefault(span.index, []).extend(span.tokens)
    assert [[text[i] for i in range(13)] for text in got] == [answers, answers]


def test_a_request_that_does_not_fit_its_slot(model, answers):
    capacity = max(LENGTHS[:5]) + NEW
    rows = model.generate_many(PROMPTS, slots=2, max_new_tokens=NEW, capacity=capacity)
    failed = [i for i, row in enumerate(rows) if row.error]
    assert failed == [i for i, length in enumerate(LENGTHS) if length > 14]
    for i, row in enumerate(rows):
        assert row.tokens == ([] if i in failed else answers[i])
        assert i not in failed or "raise capacity, or lower max" in str(row.error)


def bad_requests(p=PROMPTS[1]):
    return {
        "empty": ([], "empty; give"),
        "too high": ([1, 128], "outside 0 … 127"),
        "too long": ([1] * 256, "shorten the prompt"),
        "unknown": ({"input_ids": p, "temprature": 1.0}, "unknown option temprature; use"),
        "conflict": ({"input_ids": p, "do_sample": True, "temperature": 0}, "conflicts with temp"),
        "min above max": ({"input_ids": p, "min_new_tokens": NEW + 1}, f"{NEW + 1} is above"),
        "min_p": ({"input_ids": p, "temperature": 1.0, "min_p": 1.5}, "min_p must lie in"),
        "temperature": ({"input_ids": p, "temperature": "hot"}, "temperature must be"),
        "suppress": ({"input_ids": p, "suppress_tokens": ["x"]}, "x|str"),
        "eos": ({"input_ids": p, "eos_token_id": "</s>"}, "eos_token_id must be"),
        "seed": ({"input_ids": p, "seed": 2**64}, "64 bits"),
        "limit": ({"input_ids": p, "max_new_tokens": 0}, "max_new_tokens must be"),
        "stop": ({"input_ids": p, "stop_strings": [""]}, "stop_strings must"),
        "processor": ({"input_ids": p, "logits_processor": "greedy"}, "logits_processor must be"),
        "config": ({"input_ids": p, "generation_config": {"num_beams": 4}}, "GenerationConfig"),
        "text": ({"input_ids": "def f():"}, "tokenize"),
        "no input_ids": ({"prompt": [1]}, 'needs "input_ids"'),
        "true as a count": ({"input_ids": p, "top_k": True}, "top_k must be"),
        "scores": ({"input_ids": p, "logits_processor": lambda _, s: s[:, :5]}, "not scores"),
        "no tokenizer": ({"input_ids": p, "stop_strings": "x"}, "tiny-llama"),
        "an odd seed": ({"input_ids": p, "seed": "x"}, "seed must be"),
    }


def test_bad_requests_among_good_ones(model, answers):
    bad = bad_requests()
    requests = [PROMPTS[0], *[request for request, _ in bad.values()], PROMPTS[2]]
    rows = model.generate_many(requests, slots=2, max_new_tokens=NEW)
    assert rows[0].tokens == answers[0] and rows[-1].tokens == answers[2]
    for name, row, (request, message) in zip(bad, rows[1:-1], bad.values(), strict=True):
        assert row.finish_reason == "error" and row.tokens == [], name
        assert re.search(message, str(row.error)), name
        with pytest.raises(EagleError, match=message):
            model.eagenerate([PROMPTS[0], request], max_new_tokens=NEW)
    # only bad ones: nothing is left to run
    rows = model.generate_many([[], {"input_ids": [1], "top_k": -1}], max_new_tokens=4)
    assert [row.finish_reason for row in rows] == ["error", "error"]
    assert [i for i, _ in model.generate_many([[]], as_completed=True)] == [0]


def test_a_tokenizer_that_fails(model, answers):
    broken = EaModel(model.target, model.head, "8,4,2", tokenizer=Broken())
    requests = [PROMPTS[0], {"input_ids": PROMPTS[1], "stop_strings": "x"}, *PROMPTS[2:5]]
    rows = broken.generate_many(requests, slots=2, max_new_tokens=NEW)
    failed = rows.pop(1)
    assert tokens(rows) == [answers[0], *answers[2:5]] and failed.finish_reason == "error"
    assert re.search(r"\['x'\] .*RuntimeError: no such piece", str(failed.error))


SHARED = [
    (dict(slots=0), "slots must be"),
    (dict(capacity=0), "capacity must be"),
    (dict(temprature=1.0), "unknown option temprature"),
    (dict(generation_config=GenerationConfig(num_beams=4)), "num_beams=4"),
    (dict(seed=[1, 2, 3]), "3 seeds were given for 2 rows"),
    (dict(compile="fast"), "unknown compile 'fast'; use"),
    (dict(tree="no tree"), "tree"),
]


@pytest.mark.parametrize("options, message", SHARED)
def test_what_all_requests_share_is_the_callers_mistake(model, options, message):
    with pytest.raises(EagleError, match=message):
        model.generate_many(PROMPTS[:2], **options)
    with pytest.raises(EagleError, match=message):
        list(model.generate_many(PROMPTS[:2], as_completed=True, **options))


@pytest.mark.parametrize("after", [-1, 3], ids=["in the prompt's pass", "later"])
@pytest.mark.parametrize("draft", [True, False], ids=["head", "plain"])
def test_a_processor_that_fails(llama, model, answers, after, draft):
    process = broken_processor(len(PROMPTS[1]) + after)
    requests = [{"input_ids": PROMPTS[1], "logits_processor": process, "logprobs": True}]
    requests = [PROMPTS[0], *requests, *PROMPTS[2:]]
    # the first token of the failing row must not be taken for an end: the error stays
    eos = plain(llama, PROMPTS[1:2], max_new_tokens=1)[0]
    rows = model.generate_many(requests, slots=3, max_new_tokens=NEW, draft=draft)
    failed = rows.pop(1)
    assert tokens(rows) == [a for i, a in enumerate(answers) if i != 1]
    assert failed.finish_reason == "error" and isinstance(failed.error.__cause__, RuntimeError)
    assert "logits processor of a request raised RuntimeError: out of ideas" in str(failed.error)
    # what came before the failure is its own; nothing that the failing pass chose is kept
    assert failed.tokens == answers[1][: len(failed.tokens)] and len(failed.tokens) <= after + 1
    assert len(failed.logprobs) == len(failed.tokens)
    row = model.generate_many(requests[1:2], max_new_tokens=NEW, draft=draft, eos_token_id=eos)[0]
    assert row.finish_reason == ("error" if after < 0 else "eos")
    for generate in (model.eagenerate, lambda *a, **k: list(model.ea_generate(*a, **k))):
        with pytest.raises(EagleError, match="out of ideas"):
            generate(requests[:3], max_new_tokens=NEW, draft=draft)


class Show(TextStreamer):
    def __init__(self):
        self.calls, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.calls.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("way", ["eagenerate", "generate_many", "stream"])
def test_a_streamer(model, answers, way):
    streamer = Show()
    # in `stream` the spans are asked for
    _ = list(getattr(model, way)(PROMPTS[:1], max_new_tokens=NEW, streamer=streamer))
    # as stock `generate` calls it: the prompt [1, T], then tokens one by one
    assert streamer.calls == [[PROMPTS[0]], *[[t] for t in answers[0]]] and streamer.ended == 1
    with pytest.raises(EagleError, match="streamer"):
        model.generate_many(PROMPTS[:2], streamer=Show())


def test_limits_of_the_model_and_of_the_slot(model):
    """The longest row that the model takes and a short one, in a slot that serves both in turn."""
    long = make_prompts((250,), seed=4)[0]
    requests = [PROMPTS[3], long, PROMPTS[3], {"input_ids": long, "max_new_tokens": 1}]
    rows = model.generate_many(requests, slots=1, max_new_tokens=40)
    assert [len(row.tokens) for row in rows] == [40, 6, 40, 1]
    assert all(row.finish_reason == "length" for row in rows)
    assert tokens(rows) == alone(model, requests, max_new_tokens=40, draft=False)
