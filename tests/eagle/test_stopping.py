"""Where generation ends, what the callers see on the way, and what is refused."""

import numpy as np
import pytest
import torch
from engine_helpers import (
    ScriptedDrafter,
    engines,
    head_model,
    make_prompts,
    make_target,
    make_tokenizer,
    new_tokens,
    padded,
    plain,
    stock_greedy,
)
from transformers import BatchEncoding

from eagle.errors import EagleError
from eagle.model import EaModel

PROMPT = make_prompts((6,))


@pytest.fixture(scope="module")
def answer(llama):
    return plain(llama, PROMPT, max_new_tokens=40)[0]


def first_use(answer, low):
    """An index >= low whose token does not occur before it."""
    return next(i for i in range(low, len(answer)) if answer[i] not in answer[:i])


@pytest.mark.parametrize("low", [0, 1, 2, 3, 4, 5, 6, 7, 9])
def test_eos_anywhere_in_an_accepted_path(llama, answer, low):
    eos = answer[first_use(answer, low)]
    ends = [eos, next(t for t in range(128) if t not in answer)] if low % 2 else eos
    for model in engines(llama, [answer]):
        row = model.generate(PROMPT, max_new_tokens=40, eos_token_id=ends).rows[0]
        assert row.tokens == answer[: answer.index(eos) + 1] and row.finish_reason == "eos"


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7, 8, 12])
def test_token_limit_anywhere_in_an_accepted_path(llama, answer, limit):
    for model in engines(llama, [answer]):
        result = model.generate(PROMPT, max_new_tokens=limit)
        assert result.rows[0].tokens == answer[:limit] and result.rows[0].finish_reason == "length"
        assert result.cycles == 0 if limit == 1 else result.cycles > 0


def test_eos_is_taken_from_the_model(answer):
    eos = answer[first_use(answer, 4)]
    target = make_target("llama")
    target.model.generation_config.eos_token_id = [eos, 127]
    row = EaModel(target).generate(PROMPT, max_new_tokens=40, draft=False).rows[0]
    assert row.tokens == answer[: answer.index(eos) + 1]
    target.model.generation_config.eos_token_id = None
    target.config.eos_token_id = eos
    again = EaModel(target).generate(PROMPT, max_new_tokens=40, draft=False)
    assert new_tokens(again) == [row.tokens]
    # none asked for explicitly
    whole = EaModel(target).generate(PROMPT, max_new_tokens=40, eos_token_id=[], draft=False)
    assert whole.new_tokens == 40


@pytest.mark.parametrize("kind", ["letters", "pairs", "llama2"])
def test_stop_strings_mean_what_they_mean_in_stock_generate(llama, answer, kind):
    """Those that begin in the prompt, that begin with a space that a decoder strips, and parts of a
    character."""
    tokenizer = make_tokenizer(kind)
    whole = tokenizer.decode(PROMPT[0] + answer)
    prompt = len(tokenizer.decode(PROMPT[0]))
    places = ((-2, 4), (-1, 2), (0, 2), (3, 4), (9, 2))
    stops = [whole[prompt + a : prompt + a + n] for a, n in places]
    stops += [whole[prompt - 3 : prompt], [whole[prompt + 15 :][:3], whole[prompt + 7 :][:2]]]
    stops += ["é", "é€", " a", "x y", " "] if kind == "llama2" else ["###"]
    ended, models = 0, list(engines(llama, [answer], "8,4,2"))
    for stop in stops:
        try:
            expected = stock_greedy(llama, PROMPT[0], 40, stop_strings=stop, tokenizer=tokenizer)
        except ValueError:  # no token holds an end of it
            continue
        ended += len(expected) < 40
        for model in models:
            model._tokenizer = tokenizer
            row = model.generate(PROMPT, max_new_tokens=40, stop_strings=stop).rows[0]
            assert row.tokens == expected, stop
            assert row.finish_reason == ("stop" if len(expected) < 40 else "length")
    assert ended > len(stops) / 2


def test_steps_grow_and_end_at_the_whole(llama, answer):
    right = EaModel(llama, drafter=ScriptedDrafter([answer], True, "16,4,4"))
    for model in (head_model(llama), right):
        for method in (model.ea_generate, model.naive_generate):
            steps = [s[0].tolist() for s in method(PROMPT, max_new_tokens=40)]
            assert steps[-1] == PROMPT[0] + answer
            for a, b in zip(steps, steps[1:], strict=False):
                assert b[: len(a)] == a and len(b) > len(a)


def test_log_and_statistics(llama, answer):
    model = EaModel(llama, drafter=ScriptedDrafter([answer], True, "16,4,4"))
    ids, new, cycles = model.eagenerate(PROMPT, max_new_tokens=37, log=True)
    result = model.generate(PROMPT, max_new_tokens=37)
    assert torch.equal(ids, result.sequences) and new == 37 == result.new_tokens
    assert cycles == result.cycles == 6  # of 6 tokens each, after the first token
    assert result.acceptance_by_depth == [1.0] * 5
    assert sum(result.rows[0].accepted) == cycles
    assert result.timings.prefill > 0 and result.timings.verify > 0
    _, new, cycles = model.naivegenerate(PROMPT, max_new_tokens=9, log=True)
    assert (new, cycles) == (9, 8)


def test_one_prompt_in_every_form(llama):
    model = EaModel(llama)
    flat = [5, 9, 2]
    expected = model.naivegenerate([flat], max_new_tokens=5)
    ids, mask = padded([flat], "both")
    for given in (
        (flat,),
        (torch.tensor(flat),),
        (torch.tensor([flat]),),
        ((tuple(flat),),),
        ([torch.tensor(flat)],),
        (np.array([flat]),),
        (np.array(flat),),
        ([np.int64(t) for t in flat],),
        ({"input_ids": [flat], "attention_mask": [[1, 1, 1]]},),
        (BatchEncoding({"input_ids": torch.tensor([flat])}),),
        ([flat], [[1, 1, 1]]),
        (flat, [1, 1, 1]),
    ):
        assert torch.equal(model.naivegenerate(*given, max_new_tokens=np.int64(5)), expected)
    answer = expected[0, 3:].tolist()
    for given in (
        (ids, mask),
        (ids[0], mask[0]),
        (ids, mask.bool()),
        (ids.int(), mask.float()),
        (ids,),
        (ids.numpy(),),
        (BatchEncoding({"input_ids": ids, "attention_mask": mask}),),
        ({"input_ids": ids.tolist(), "attention_mask": mask.tolist()},),
    ):
        assert model.naivegenerate(*given, max_new_tokens=5).tolist() == [[0, *flat, 0, *answer]]
    whole = dict(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
    assert model.naivegenerate(**whole, max_new_tokens=5)[0, 5:].tolist() == answer
    with pytest.raises(EagleError, match="token_type_ids"):
        model.naivegenerate(**{**whole, "token_type_ids": mask}, max_new_tokens=5)


IDS = torch.ones(2, 4, dtype=torch.int64)
BAD = {
    "no prompt": ([], None, "empty; give"),
    "no rows": (IDS[:0], None, "empty; give"),
    "empty prompt": ([[1, 2], []], None, "prompt 1 is empty"),
    "no columns": (IDS[:, :0], IDS[:, :0], "prompt 0 is empty"),
    "text": (["def f():"], None, "tokenize"),
    "bare text": ("def f():", None, "tokenize"),
    "mixed": ([[1, 2], 3], None, "tokenize"),
    "floats": ([[1.0, 2.0]], None, "tokenize"),
    "float tensor": (torch.rand(2, 3), None, "whole numbers"),
    "three dimensions": (IDS[None], None, "whole numbers"),
    "no ids": ({"prompt": [1]}, None, "no input_ids"),
    "nothing": (None, None, "token ids"),
    "hole": (IDS[:1], torch.tensor([[1, 0, 1, 1]]), "holes"),
    "two holes": (torch.ones(1, 6).long(), torch.tensor([[0, 1, 0, 1, 1, 0]]), "holes"),
    "all masked": (IDS, torch.tensor([[1] * 4, [0] * 4]), "prompt 1 is empty"),
    "other shape": (IDS, torch.ones(2, 5), "does not fit"),
    "mask with lists": ([[1, 2], [3]], [[0, 1], [1]], "different lengths"),
    "a mask too long": ([[1, 2]], torch.ones(1, 3), "does not fit"),
    "padding inside": (torch.tensor([[4, 0, 7]]), None, "padding token stands between"),
    "a bool": ([[True, 2]], None, "tokenize"),
    "too high": ([[1, 128]], None, "outside 0 … 127"),
    "negative": ([[1, -1]], None, "outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prompts_are_refused(llama, name):
    ids, mask, message = BAD[name]
    with pytest.raises(EagleError, match=message):
        EaModel(llama).naivegenerate(ids, mask)
