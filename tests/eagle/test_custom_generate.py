"""The engine behind stock `model.generate(..., custom_generate=...)`."""

import pytest
import torch
from engine_helpers import head_model

from eagle import EagleError

OPTIONS = dict(max_new_tokens=30, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def model(llama):
    return head_model(llama)


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.4}], ids=["greedy", "processor"])
def test_equals_stock_generate(model, extra):
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    stock = model.target.model
    ours = stock.generate(
        ids, custom_generate=model.custom_generate, do_sample=False, **OPTIONS, **extra
    )
    with model.target.stock():
        expected = stock.generate(ids, do_sample=False, **OPTIONS, **extra)
    assert torch.equal(ours, expected)


def test_sampling_keeps_the_calls_settings(model):
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    stock = model.target.model
    torch.manual_seed(0)
    kept = stock.generate(
        ids,
        custom_generate=model.custom_generate,
        do_sample=True,
        temperature=0.7,
        top_k=1,
        **OPTIONS,
    )
    greedy = model.eagenerate(ids, max_new_tokens=30, eos_token_id=-1)
    assert torch.equal(kept, greedy)  # top_k=1 leaves one token


def test_another_model_is_refused(model, targets):
    other = targets("qwen2").model
    with pytest.raises(EagleError, match="another model"):
        other.generate(torch.tensor([[1, 2]]), custom_generate=model.custom_generate, **OPTIONS)


def test_foreign_stopping_criteria_are_refused(model):
    from transformers import MaxTimeCriteria, StoppingCriteriaList

    with pytest.raises(EagleError, match="MaxTimeCriteria"):
        model.target.model.generate(
            torch.tensor([[1, 2]]), custom_generate=model.custom_generate,
            stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(1.0)]), **OPTIONS,
        )  # fmt: skip
