"""Heads for targets that are served quantized and with an adapter."""

import json

import pytest
import torch
from head_helpers import config, write_fim

from eagle.checkpoint import load_head
from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.target import Target
from train.main import run

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A LoRA on the tiny target, and training data."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    write_fim(folder / "fim.jsonl")
    return folder


def test_a_head_is_adapted_to_the_tuned_target(base, tuned, tmp_path):
    data = tuned / "fim.jsonl"
    assert run(config(base, data, tmp_path / "bare"), quiet=True) == 0
    model = {
        "adapter": str(tuned / "adapter"),
        "quantization": "nf4",
        "init_head": str(tmp_path / "bare/head"),
        "draft_vocab_size": None,
    }
    cfg = config(base, data, tmp_path / "tuned", model=model)
    with pytest.warns(UserWarning, match="no adapter.*quantization"):
        assert run(cfg, quiet=True) == 0
    bare, adapted = (
        json.loads((tmp_path / name / "head/eagle.json").read_text())["target"]
        for name in ("bare", "tuned")
    )
    assert bare["adapter"] is None and bare["quantization"] == "none"
    assert adapted["quantization"] == "nf4" and len(adapted["adapter"]) == 64
    assert bare["fingerprint"] == adapted["fingerprint"]
    # the map is reused, and the head drafts losslessly for the target it was adapted to
    target = Target.from_pretrained(
        base, dtype="float32", adapter_path=tuned / "adapter", quantization="nf4"
    )
    head, _ = load_head(tmp_path / "tuned/head", target, dtype="float32")
    old, _ = load_head(tmp_path / "bare/head")
    assert torch.equal(head.d2t, old.d2t)
    model = EaModel(target, head, "8,3,2")
    ids = model.eagenerate([[5, 6, 7]], max_new_tokens=20)
    assert torch.equal(ids, model.naivegenerate([[5, 6, 7]], max_new_tokens=20))
    bare = config(base, data, tmp_path / "tuned", resume="auto", max_steps=6)
    with pytest.raises(EagleError, match="belongs to a run with target"):
        run(bare, quiet=True)
