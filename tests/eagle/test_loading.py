"""Quantized and adapted targets: loaded right, lossless, and named in what a head records."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from engine_helpers import make_config, make_head, make_model, make_prompts
from safetensors.torch import load_file, save_file

from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.loading import differences
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
    found = {"id": "b", "fingerprint": "f" * 64, "quantization": "none", "adapter": None}
    assert differences({"id": "a", "fingerprint": "f" * 64}, found) == []
    silent = {"fingerprint": "f" * 64, "adapter": None, "quantization": None}
    assert differences(silent, found) == []
    assert len(differences({"fingerprint": "e" * 64}, found)) == 1


def test_what_cannot_be_loaded(base, adapter, tmp_path):
    def load(**options):
        return Target.from_pretrained(base, device="cpu", **options)

    with pytest.raises(EagleError, match="unknown quantization 'int4'; use none, nf4, int8"):
        load(quantization="int4")
    with pytest.raises(EagleError, match="no adapter folder"):
        load(adapter_path=tmp_path / "nowhere")
    record = {"base": {"id": "other", "fingerprint": "0" * 64}}
    marked = Path(shutil.copytree(adapter, tmp_path / "marked"))
    (marked / "eagle.json").write_text(json.dumps(record))
    with pytest.raises(EagleError, match="was trained on other .* give that base"):
        load(adapter_path=marked)
    (marked / "eagle.json").unlink()
    weights = load_file(marked / "adapter_model.safetensors")
    renamed = {k.replace("q_proj", "query"): v for k, v in weights.items()}
    save_file(renamed, marked / "adapter_model.safetensors")
    with pytest.raises(EagleError, match="does not fit"):
        load(adapter_path=marked)
    (marked / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(EagleError, match="damaged"):
        load(adapter_path=marked)
    wide = make_model(make_config("llama", hidden_size=32))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(EagleError, match="does not fit"):
        Target.from_pretrained(tmp_path / "wide", device="cpu", adapter_path=adapter)
