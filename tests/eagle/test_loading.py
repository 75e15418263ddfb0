"""Quantized and adapted targets: loaded right, lossless, and named in what a head records."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from engine_helpers import make_config, make_head, make_model, make_prompts
from safetensors.torch import load_file, save_file

from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.fingerprint import samples, target_fingerprint
from eagle.loading import EMBEDDED, differences, identity_of, load_model, load_tokenizer
from eagle.model import EaModel
from eagle.target import Target

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(make_config("llama", hidden_size=64, head_dim=16)).save_pretrained(folder)
    return folder


def make_adapter(base, folder, seed=0):
    """A LoRA that moves the outputs, in peft's layout."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


def stock(target, prompt, new):
    """What transformers itself makes of the same loaded model."""
    with target.stock() as model:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tuned", [False, True])
def test_generation_is_the_tuned_targets_own(base, adapter, quantization, tuned):
    if quantization == "int8" and not torch.cuda.is_available():
        pytest.importorskip("bitsandbytes", minversion="0.49")
    where = dict(dtype="float32", device="cpu")
    how = dict(quantization=quantization, adapter_path=adapter if tuned else None)
    target = Target.from_pretrained(base, **where, **how)
    model = EaModel(target, make_head(target, 64), "8,3,2")
    prompts = make_prompts((5, 9))
    ids = model.eagenerate(prompts, max_new_tokens=20)
    for prompt, line in zip(prompts, ids.tolist(), strict=True):
        assert line[: len(prompt) + 20] == stock(target, prompt, 20)
    plain = Target.from_pretrained(base, **where)
    if quantization == "none":
        same = EaModel(plain).naivegenerate(prompts, max_new_tokens=20).tolist() == ids.tolist()
        assert same == (not tuned)
    found, bare = target.identity, plain.identity
    assert found["fingerprint"] == bare["fingerprint"]  # of the checkpoint, however it is loaded
    assert found["quantization"] == quantization and bare["quantization"] == "none"
    assert (found["adapter"] is not None) == tuned
    linear = type(target.layers[0].self_attn.q_proj).__name__
    assert (quantization == "nf4") == ("4bit" in linear.lower())
    assert (quantization == "int8") == ("8bit" in linear.lower())


def test_a_head_for_another_adapter_or_quantization_is_named(base, adapter, tmp_path):
    def load(**options):
        return Target.from_pretrained(base, device="cpu", **options)

    folder, tuned = tmp_path / "head", load(adapter_path=adapter, quantization="nf4")
    save_head(make_head(tuned, 64), folder, {"target": tuned.identity})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_head(folder, tuned)
    with pytest.warns(UserWarning, match="no adapter.*quantization=nf4.*--init_head"):
        load_head(folder, load())
    other = make_adapter(base, tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="with the adapter .* has the adapter") as said:
        load_head(folder, load(adapter_path=other, quantization="nf4"))
    assert "quantization" not in str(said[0].message)


def test_what_an_old_record_does_not_say_is_no_difference():
    found = {"id": "b", "fingerprint": "2:ff", "quantization": "none", "adapter": None}
    assert differences({"id": "a", "fingerprint": "2:ff"}, found) == []
    assert differences({"fingerprint": "2:ff", "adapter": None, "quantization": None}, found) == []
    for other, said in (("2:ee", "was trained on a "), ("f" * 64, "earlier version .* a, whose")):
        (told,) = differences({"id": "a", "fingerprint": other}, found)
        assert re.search(said, told)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "nf4", "lora"])
@torch.no_grad()
def test_every_tensor_counts(kind, base, adapter):
    """Zeroed, scaled or exchanged for another of its shape, it changes what is recorded."""
    if kind in ("nf4", "lora"):
        how = {"quantization": "nf4"} if kind == "nf4" else {"adapter_path": adapter}
        model = load_model(base, device="cpu", dtype="float32", **how)[0]
    else:
        model = make_model(make_config(kind, hidden_size=64, tie_word_embeddings=kind == "llama"))
        for p in model.parameters():
            p.normal_()

    def told():
        found = identity_of(model, "")
        return found["fingerprint"], found["adapter"]

    before, seen = told(), {}
    state, again = (model.state_dict(keep_vars=True) for _ in range(2))
    # but for what bitsandbytes makes for each look
    tensors = {id(t): t for n, t in state.items() if t is again[n]}.values()
    for tensor in tensors:
        kept, twins = tensor.clone(), seen.setdefault((tensor.shape, tensor.dtype), [])
        other = next((t for t in twins if not torch.equal(t, tensor)), None)
        scaled = kept * 1.01 if kept.is_floating_point() else kept + 1
        for changed in (torch.zeros_like(kept), scaled):
            tensor.copy_(changed)
            assert told() != before
        if other is not None:
            tensor.copy_(other)
            other.copy_(kept)
            assert told() != before
            other.copy_(tensor)
        tensor.copy_(kept)
        twins.append(tensor)
    assert told() == before and len(tensors) > 30


@torch.no_grad()
def test_names_ties_and_places_count():
    model = make_model(make_config("llama", tie_word_embeddings=True))
    found = target_fingerprint(model)
    lora = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    assert target_fingerprint(peft.get_peft_model(copy.deepcopy(model), lora)) == found
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert target_fingerprint(model) != found
    model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(EagleError, match="lm_head.weight .* NaN; restore"):
        target_fingerprint(model)
    with pytest.raises(EagleError, match="not in memory whole"):
        target_fingerprint(model.to("meta"))
    matrix = torch.arange(70 * 90, dtype=torch.int32).view(70, 90)
    (whole,), (turned,) = samples([matrix]), samples([matrix.t().contiguous().t()])
    assert torch.equal(whole, turned)  # strided or not
    taken = whole.view(32, 128)
    assert (taken.diff(dim=1) == 1).all() and (taken[:, 0] // 196.875 == torch.arange(32)).all()
    (experts,) = samples([torch.arange(64).repeat_interleave(1200).view(64, 30, 40)])
    assert (experts.bincount(minlength=64) > 300).all()


def test_the_embedded_head_is_of_the_embedded_model():
    """Its record also pins the rule: it must not change without its number."""
    record = json.loads((EMBEDDED / "heads/eagle3/eagle.json").read_text())
    assert load_model(dtype="float16")[1]["fingerprint"] == record["target"]["fingerprint"]


def test_what_cannot_be_loaded(base, adapter, tmp_path):
    def load(**options):
        return Target.from_pretrained(base, device="cpu", **options)

    with pytest.raises(EagleError, match="unknown quantization 'int4'; use none, nf4, int8"):
        load(quantization="int4")
    with pytest.raises(EagleError, match="no adapter folder"):
        load(adapter_path=tmp_path / "nowhere")
    shutil.copytree(adapter, tmp_path / "run/adapter")
    for folder in (adapter, tmp_path / "run"):
        for use in (EaModel.from_pretrained, load_tokenizer):
            with pytest.raises(EagleError, match=f"use --adapter {folder} with --base {base} "):
                use(folder)
    record = {"base": {"id": "other", "fingerprint": "0" * 64}}
    marked = Path(shutil.copytree(adapter, tmp_path / "marked"))
    (marked / "eagle.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="recorded by an earlier version, as one on other"):
        load(adapter_path=marked)
    record["base"]["fingerprint"] = "2:0"
    (marked / "eagle.json").write_text(json.dumps(record))
    with pytest.raises(EagleError, match="was trained on other .* give that base"):
        load(adapter_path=marked)
    (marked / "eagle.json").unlink()
    weights = load_file(marked / "adapter_model.safetensors")
    renamed = {k.replace("q_proj", "query"): v for k, v in weights.items()}
    save_file(renamed, marked / "adapter_model.safetensors")
    with pytest.raises(EagleError, match="does not fit"):
        load(adapter_path=marked)
    first = next(iter(weights))
    strange = {"base_model.model.lm_head.weight": torch.zeros(128, 64)}
    magnitude = {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}
    for more, named in (
        (strange, "holds base_model.model.lm_head.weight.* merge it .*finetune merge"),
        (magnitude, "is a DoRA"),
        ({first: weights[first] * torch.nan}, f"{first} holds NaN"),
    ):
        save_file({**weights, **more}, marked / "adapter_model.safetensors")
        with pytest.raises(EagleError, match=named):
            load(adapter_path=marked)
    (marked / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(EagleError, match="damaged"):
        load(adapter_path=marked)
    wide = make_model(make_config("llama", hidden_size=32))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(EagleError, match="does not fit"):
        Target.from_pretrained(tmp_path / "wide", device="cpu", adapter_path=adapter)
