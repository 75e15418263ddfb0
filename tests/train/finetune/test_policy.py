"""The quantized base and the adapter on it: real NF4, true gradients, and what belongs to what."""

import bitsandbytes as bnb
import pytest
import torch
from finetune_helpers import TASKS

from configs.finetune_schema import LoraSection, PolicyConfig, TaskConfig
from eagle import loading
from eagle.errors import EagleError
from train.finetune import adapter
from train.finetune.policy import base_fingerprint, base_name, build_policy, trainable_state
from train.finetune.task_heads import TaskHeads, attach

IDS = torch.arange(5, 45).reshape(2, 20)


def policy(base, quantization="nf4", seed=0, **lora):
    cfg = PolicyConfig(base=str(base), quantization=quantization, compute="fp32")
    return build_policy(cfg, LoraSection(r=4, dropout=0.0, **lora), seed, None)


def gradients(model, ids=IDS):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_base_is_in_4_bit_and_the_adapter_in_fp32(base):
    model = policy(base)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 4 * 7  # every linear layer but the output's
    state = layers[0].weight.quant_state
    assert layers[0].weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and "lora_" in n for n, p in trainable.items())
    counts = model.get_nb_trainable_parameters()
    assert counts[0] == sum(p.numel() for p in trainable.values())
    stock = policy(base, "none").get_nb_trainable_parameters()
    assert counts == stock  # a packed weight counts what it stands for


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_adapter_matrix_learns(base, quantization):
    model = policy(base, quantization)
    with torch.no_grad():  # a fresh B is zero, and with it the gradient of A
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.02)
    found = gradients(model)
    assert len(found) == 2 * 4 * 7
    assert all(g.abs().max() > 0 for g in found.values())


def test_an_evaluation_changes_no_gradient(base):
    """On some CPUs a pass without gradients used to repack 4-bit weights into what cannot be
    trained.
    """
    model = policy(base)
    expected = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    found = gradients(model)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert any(g.abs().max() > 0 for g in found.values())
    linear = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in linear)


def test_checkpointing_changes_no_gradient(base):
    model = policy(base)
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model)
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)


def test_fingerprints_know_the_base_not_its_quantization(base, other_base):
    assert base_fingerprint(str(base)) == base_fingerprint(str(base))
    assert base_fingerprint(str(base)) != base_fingerprint(str(other_base))
    assert base_name(None) == "embedded" and base_name(str(base)) == str(base.resolve())


def test_an_adapter_is_written_whole_and_read_back(base, tmp_path, tokenizer):
    model = policy(base)
    heads = TaskHeads([TaskConfig.model_validate(t) for t in TASKS], 64, learned=True)
    heads.mean[2] = 3.0
    attach(model, heads)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    record = {"base": {"id": "x", "fingerprint": "f" * 64}, "quantization": "nf4"}
    adapter.write_adapter(tmp_path / "a", model, trainable_state(model), tokenizer, record, TASKS)
    written = loading.read_record(tmp_path / "a")
    assert written["kind"] == "adapter" and len(written["fingerprint"]) == 64
    assert adapter.adapter_bytes(tmp_path / "a") < 400_000
    assert "nf4" in (tmp_path / "a" / "README.md").read_text()

    fresh = policy(base, seed=1)
    attach(fresh, TaskHeads(heads.tasks, 64, learned=True))
    adapter.load_trainable(fresh, tmp_path / "a")
    state, expected = trainable_state(fresh), trainable_state(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[n], expected[n]) for n in expected)
    assert fresh.get_base_model().task_heads.mean[2] == 3.0

    again = build_policy(PolicyConfig(base=str(base)), LoraSection(), 0, tmp_path / "a")
    lora = {n: p for n, p in trainable_state(again).items()}
    assert lora and all(torch.equal(p, expected[n]) for n, p in lora.items())


def test_what_does_not_belong_is_refused(base, other_base, tmp_path, tokenizer):
    model = policy(base)
    record = {"base": {"id": str(base), "fingerprint": base_fingerprint(str(base))}}
    adapter.write_adapter(tmp_path / "a", model, trainable_state(model), tokenizer, record)
    found = loading.read_record(loading.find_adapter(tmp_path / "a"))
    loading.require_base(tmp_path / "a", found, "base", base_fingerprint(str(base)))
    with pytest.raises(EagleError, match=r"was trained on .*base.* not on other"):
        loading.require_base(tmp_path / "a", found, "other", base_fingerprint(str(other_base)))
    with pytest.raises(EagleError, match="no adapter in"):
        loading.find_adapter(tmp_path)
    with pytest.raises(EagleError, match="does not fit"):
        adapter.load_trainable(policy(base, target_modules=["q_proj"]), tmp_path / "a")
    (tmp_path / "a" / adapter.WEIGHTS).write_bytes(b"torn")
    with pytest.raises(EagleError, match="missing or damaged"):
        adapter.load_trainable(model, tmp_path / "a")
    with pytest.raises(EagleError, match="fits no layer"):
        policy(base, target_modules=["nothing_of_that_name"])
    with pytest.raises(EagleError, match="cannot load the base model"):
        build_policy(PolicyConfig(base=str(tmp_path)), LoraSection(), 0, None)
