"""What is committed is what a fresh prefill writes; what is not committed can hold anything."""

import pytest
import torch
from engine_helpers import (
    ScriptedDrafter,
    engines,
    head_model,
    make_prompts,
    make_target,
    new_tokens,
    plain,
    poison,
    prefilled,
)

from eagle.attention import TreeContext
from eagle.errors import EagleError
from eagle.model import EaModel


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_committed_slots_equal_a_fresh_prefill_after_50_cycles(targets, family):
    target = targets(family)
    prompts = make_prompts((9, 3, 14))
    new = 160
    answers = plain(target, prompts, max_new_tokens=new)
    # every third token wrong: branches are accepted and rejected all the time
    mixed = [
        [t if (i + row) % 3 else (t + 1) % 128 for i, t in enumerate(a)]
        for row, a in enumerate(answers)
    ]
    commits = 0

    def watch(cache, _):
        nonlocal commits
        commits += 1
        if commits % 17:
            return
        for place, row in enumerate(cache.order):
            length = cache.host_lengths[place]
            assert cache.lengths[place] == length
            tokens = (prompts[row] + answers[row])[:length]
            got = cache.buffer[:, :, row, :, :length]
            fresh, _ = prefilled(target, [tokens])
            assert torch.allclose(got, fresh.buffer[:, :, 0], atol=1e-4)

    model = EaModel(target, drafter=ScriptedDrafter(mixed, True, "16,4,4"))
    assert new_tokens(model.generate(prompts, max_new_tokens=new, on_cache=watch)) == answers
    assert commits > 50


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("lengths", [(8, 8), (9, 2, 15)], ids=["even", "ragged"])
def test_slots_past_the_length_are_never_read(targets, family, lengths):
    target, prompts = targets(family), make_prompts(lengths)
    clean = plain(target, prompts, max_new_tokens=40)

    for model in engines(target, clean):  # accepted drafts must survive it too
        result = model.generate(prompts, max_new_tokens=40, on_cache=poison)
        assert new_tokens(result) == clean


@pytest.mark.parametrize("spare", [-1, 0, 1])
@pytest.mark.parametrize("right", [True, False, None], ids=["right", "wrong", "random"])
def test_model_limit(spare, right):
    """The limit lies one token before, at, and one after the end of what is asked for."""
    limit, new = 32, 12
    target = make_target("llama", max_position_embeddings=limit)
    prompts = make_prompts((limit - new - spare, 5))
    room = min(new, limit - len(prompts[0]))
    assert room == min(new, new + spare)
    answers = plain(target, prompts, max_new_tokens=new)
    assert [len(a) for a in answers] == [room, new]
    model = head_model(target, "60,7,10")
    if right is not None:
        model = EaModel(target, drafter=ScriptedDrafter(answers, right, "16,4,4"))
    result = model.generate(prompts, max_new_tokens=new)
    assert new_tokens(result) == answers
    assert [row.finish_reason for row in result.rows] == ["length", "length"]
    assert result.sequences.shape[1] <= limit


def test_prompts_at_the_limit():
    model = head_model(make_target("llama", max_position_embeddings=16), "60,7,10")
    (longest,) = make_prompts((15,))
    row = model.generate([longest], max_new_tokens=50).rows[0]
    assert len(row.tokens) == 1 and row.finish_reason == "length"
    for length in (16, 40):
        with pytest.raises(EagleError, match="limit is 16.*shorten"):
            model.generate([[1, 2], make_prompts((length,))[0]], max_new_tokens=5)
    with pytest.raises(EagleError, match="limit is 10"):
        model.generate([longest], max_length=10)
    for limit, end in ((9, 9), (99, 16)):
        assert model.eagenerate([longest[:5]], max_length=limit).shape[1] == end


def test_finished_rows_are_not_computed(llama):
    """Rows end at different cycles; their slots then stay as they were while the others go on."""
    prompts = make_prompts((9, 3, 14, 5))
    answers = plain(llama, prompts, max_new_tokens=40)
    eos = {answers[0][6], answers[1][12]}
    model = head_model(llama, "16,4,4", draft_vocab=128)
    frozen, seen, checks = {}, [], 0

    def watch(cache, drafter):
        nonlocal checks
        assert cache.order == drafter.cache.order and len(cache.order) == len(drafter.last)
        seen.append(list(cache.order))
        for row in set(range(4)) - set(cache.order):
            if row in frozen:
                assert torch.equal(cache.buffer[:, :, row].nan_to_num(), frozen[row])
                checks += 1
            frozen[row] = cache.buffer[:, :, row].nan_to_num()

    rows = model.generate(prompts, max_new_tokens=40, eos_token_id=list(eos), on_cache=watch).rows
    assert checks > 5 and len(seen[0]) > len(seen[-1]) >= 1
    assert len({row.finish_reason for row in rows}) == 2
    expected = plain(llama, prompts, max_new_tokens=40, eos_token_id=list(eos))
    assert [r.tokens for r in rows] == expected


def test_the_cost_of_a_pass_follows_the_context(llama):
    """Attention is given the live slots, never the capacity."""
    cache = llama.new_cache(2, 1000)
    cache.advance(torch.tensor([5, 9]), [5, 9])
    positions = cache.lengths[:, None] + torch.arange(4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 4, 4)
    keys, values = TreeContext(cache, positions, mask, positions).read(0)
    assert keys.shape[2] == values.shape[2] == 13
