"""The quantized base and the adapter on it: real NF4, true gradients, and what belongs to what."""

import bitsandbytes as bnb
import pytest
import torch
from data_helpers import with_tokenizer
from finetune_helpers import TASKS, fingerprint_of, go, task_records, write_lines
from safetensors.torch import load_file

from configs.finetune_schema import LoraSection, PolicyConfig, TaskConfig
from eagle import loading
from eagle.errors import EagleError
from train.finetune.policy import HEADS, base_name, build_policy, trainable_state, write_adapter
from train.finetune.task_heads import TaskHeads, attach

IDS = torch.arange(5, 45).reshape(2, 20)


def policy(base, quantization="nf4", adapter=None, **lora):
    cfg = {"base": str(base), "quantization": quantization, "compute": "fp32", "adapter": adapter}
    return build_policy(PolicyConfig(**cfg), LoraSection(r=4, dropout=0.0, **lora), 0)


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


def test_neither_an_evaluation_nor_checkpointing_changes_a_gradient(base):
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
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model)
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)


def test_an_adapter_is_written_whole_and_read_back(base, tmp_path, tokenizer):
    model, folder = policy(base), tmp_path / "a"
    heads = TaskHeads([TaskConfig.model_validate(t) for t in TASKS], 64, learned=True)
    heads.mean[2] = 3.0
    attach(model, heads)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    record = {"base": {"id": "x", "fingerprint": "f" * 64}, "quantization": "nf4"}
    write_adapter(folder, model, trainable_state(model), tokenizer, record, TASKS)
    written = loading.read_record(folder)
    assert written["kind"] == "adapter" and len(written["fingerprint"]) == 64
    assert "nf4" in (folder / "README.md").read_text()
    expected, again = trainable_state(model), trainable_state(policy(base, adapter=str(folder)))
    assert again and all(torch.equal(p, expected[n]) for n, p in again.items())
    heads, found = model.get_base_model().task_heads.state_dict(), load_file(folder / HEADS)
    assert heads.keys() == found.keys() and all(torch.equal(found[n], heads[n]) for n in heads)


def test_what_does_not_fit_is_refused(base, other_base, tmp_path):
    """A fingerprint knows the base, not its quantization."""
    assert fingerprint_of(base) != fingerprint_of(other_base)
    assert base_name(None) == "embedded" and base_name(str(base)) == str(base.resolve())
    with pytest.raises(EagleError, match="no adapter in"):
        policy(base, adapter=str(tmp_path))
    with pytest.raises(EagleError, match="fits no layer"):
        policy(base, target_modules=["nothing_of_that_name"])
    with pytest.raises(EagleError, match="cannot load the base model"):
        policy(tmp_path)


@pytest.mark.parametrize("method", ["dpo", "multitask"])
def test_ids_beyond_the_embeddings_are_named_before_training(base, tmp_path, method):
    """A tokenizer may hold more ids than the base has embeddings."""
    more = [f"<extra{n}>" for n in range(60)]
    other = with_tokenizer(base, tmp_path / "base", lambda tokenizer: tokenizer.add_tokens(more))
    rows, good = task_records(20), {"prompt": "say it", "chosen": "yes", "rejected": "no"}
    rows = [{**good, "chosen": f"yes {n}"} for n in range(20)] if method == "dpo" else rows
    field = "chosen" if method == "dpo" else "text"
    rows[7] = {**rows[7], field: "it is <extra59>"}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    limits = {"heldout_fraction": 0.2, "max_bad_fraction": 0.01}
    with pytest.raises(EagleError, match=r"rows.jsonl:8: token id outside the vocabulary \("):
        go(method, other, path, tmp_path / "run", data=limits)
