"""The engine behind stock `model.generate(..., custom_generate=...)`."""

import inspect

import pytest
import torch
from engine_helpers import head_model, make_tokenizer
from transformers import DynamicCache, LlamaModel, MaxTimeCriteria, StopStringCriteria

from eagle import EagleError
from eagle.heads.pack import pack_head

OPTIONS = dict(max_new_tokens=30, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def model(llama):
    return head_model(llama)


def test_another_model_is_refused(model, targets):
    other = targets("qwen2").model
    with pytest.raises(EagleError, match="another model"):
        other.generate(torch.tensor([[1, 2]]), custom_generate=model.custom_generate, **OPTIONS)


class Collect(list):
    ended = 0

    def put(self, value):
        self += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("way", ["callable", "folder"])
def test_the_streamer_and_the_result_are_the_calls_own(model, way, tmp_path):
    """What stock `generate` would put into the streamer, once; a dict where one is asked for; stop
    strings."""
    ids, stock = torch.tensor([[3, 1, 4, 1, 5]]), model.target.model
    how = dict(custom_generate=model.custom_generate)
    if way == "folder":
        folder = tmp_path / "packed"
        pack_head(model.head, folder, to="eagle", license="mit", base_model="a/b", provenance={})
        how = dict(custom_generate=str(folder), trust_remote_code=True)
    streamer, theirs, tokenizer = Collect(), Collect(), make_tokenizer()
    options = dict(do_sample=False, **OPTIONS)
    with model.target.stock():
        expected = stock.generate(ids, streamer=theirs, **options)
    out = stock.generate(ids, streamer=streamer, return_dict_in_generate=True, **how, **options)
    assert torch.equal(out.sequences, expected)
    assert streamer == theirs == expected[0].tolist()
    assert streamer.ended == theirs.ended == 1
    stop = tokenizer.decode(expected[0, 12:14])
    with model.target.stock():
        expected = stock.generate(ids, tokenizer=tokenizer, stop_strings=stop, **options)
    stops = dict(stopping_criteria=[StopStringCriteria(tokenizer, stop)])
    if way == "folder":
        stops = dict(tokenizer=tokenizer, stop_strings=stop)
    assert torch.equal(stock.generate(ids, **stops, **how, **options), expected)
    assert expected.shape[1] < 35


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"guidance_scale": 1.5},
        {"output_scores": True},
        {"output_attentions": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"inputs_embeds": torch.zeros(1, 5, 32)},
        {"position_ids": torch.tensor([[5, 6, 7, 8, 9]])},
        {"stopping_criteria": [MaxTimeCriteria(1.0)]},
        {"cache": "filled"},
    ],
    ids=lambda a: next(iter(a)),
)
def test_what_it_cannot_do_is_refused_by_name(model, asked):
    ids, stock = torch.tensor([[3, 1, 4, 1, 5]]), model.target.model
    if "cache" in asked:
        names = inspect.signature(LlamaModel.forward).parameters
        asked = {"cache" if "cache" in names else "past_key_values": DynamicCache()}
        stock(ids, **asked)
        ids = torch.cat([ids, ids], dim=1)
    named = "|".join({*asked, "cache"} if "cache" in str(asked) else asked)
    named = named.replace("stopping_criteria", "MaxTimeCriteria")
    how = dict(custom_generate=model.custom_generate, return_dict_in_generate=True)
    with pytest.raises((EagleError, ValueError), match=named):
        stock.generate(ids, do_sample=False, **how, **asked, **OPTIONS)
