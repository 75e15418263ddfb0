"""Stock models behind our attention and cache: same logits, honest positions, and clear
refusals."""

import pytest
import torch
import transformers
from engine_helpers import (
    BASE,
    FAMILIES,
    NODES,
    ScriptedDrafter,
    head_model,
    make_config,
    make_model,
    make_prompts,
    make_target,
    make_tree,
    new_tokens,
    plain,
    prefilled,
    stock_greedy,
)

from eagle.errors import EagleError
from eagle.heads.head import default_feature_layers
from eagle.model import EaModel
from eagle.target import Target

SMALL = {k: v for k, v in BASE.items() if k != "head_dim"}


def family(name, **changes):
    return make_model(getattr(transformers, name)(**{**SMALL, **changes}))


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 4), (4, 4, 4), (3, 1, 0)])
@torch.inference_mode()
def test_any_feature_layers(layers):
    target, before_norm = make_target("llama"), []
    target.set_feature_layers(layers)
    target.backbone.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    ids = torch.tensor(make_prompts((5,)))
    with target.stock() as model:
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    # what leaves the last layer; transformers' own last state is normed
    states = [*states[:4], before_norm[0]]
    _, features = prefilled(target, ids.tolist())
    assert torch.allclose(features, torch.cat([states[i] for i in layers], -1), atol=1e-4)
    for bad in ((0, 1), (0, 1, 5), (-1, 1, 2)):
        with pytest.raises(EagleError, match="feature layers"):
            target.set_feature_layers(bad)


def test_weights_that_are_no_numbers_are_named():
    broken = make_model(make_config("llama"))
    broken.model.norm.weight.data[3] = torch.inf
    with pytest.raises(EagleError, match="1 weights hold some, model.norm.weight first"):
        Target(broken)
    wide = make_model(make_config("llama"))
    wide.model.norm.weight.data.mul_(1e3)
    wide.lm_head.weight.data.mul_(1e2)
    with pytest.raises(EagleError, match="overflow in torch.float16; load it with dtype=float32"):
        Target(wide.half())


def test_default_feature_layers():
    assert default_feature_layers(32) == (2, 16, 29) and default_feature_layers(16) == (2, 8, 13)
    for layers in range(2, 12):
        ids = default_feature_layers(layers)
        assert len(set(ids)) == 3 and list(ids) == sorted(ids) and 0 <= ids[0] and ids[-1] <= layers
    with pytest.raises(EagleError, match="three feature layers"):
        default_feature_layers(1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(6, 6), (9, 2)], ids=["even", "ragged"])
@torch.inference_mode()
def test_tree_logits_equal_every_path_on_its_own(targets, name, lengths):
    target = targets(name)
    prompts = make_prompts(lengths)
    cache, _ = prefilled(target, prompts, spare=9)
    tree = make_tree([NODES] * len(prompts), 4)
    logits, features = target.verify_tree(tree.tokens, tree.depth, tree.mask, cache, features=True)
    with target.stock() as model:
        for b, prompt in enumerate(prompts):
            for n in range(len(NODES)):
                path = [NODES[m][0] for m in tree.mask[b, n].nonzero()[:, 0]]
                ids = torch.tensor([prompt + path])
                out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
                assert torch.allclose(logits[b, n], out.logits[0, -1], atol=1e-4)
                # below the last layer's output, of which transformers only gives the normed form
                expected = torch.cat([out.hidden_states[i] for i in (1, 2)], dim=-1)[0, -1]
                assert torch.allclose(features[b, n, : len(expected)], expected, atol=1e-4)


def check_lossless(target, lengths=(9, 3, 14), new=60):
    """Up to the model's limit: plain, drafted and scripted output are one, and equal stock
    generate."""
    prompts = make_prompts(lengths)
    slow = plain(target, prompts, max_new_tokens=new)
    assert new_tokens(head_model(target, "16,4,4").generate(prompts, max_new_tokens=new)) == slow
    right = EaModel(target, drafter=ScriptedDrafter(slow, True, "16,4,4"))
    assert new_tokens(right.generate(prompts, max_new_tokens=new)) == slow
    for prompt, tokens in zip(prompts, slow, strict=True):
        assert plain(target, [prompt], max_new_tokens=new) == [tokens]
        assert stock_greedy(target, prompt, len(tokens)) == tokens
    return slow


@pytest.mark.parametrize("layers", [2, 3])
def test_shallow_models_work(layers):
    check_lossless(make_target("llama", num_hidden_layers=layers), new=12)


def test_dynamic_rope_at_the_end_of_the_context():
    """Drafts past the limit must not rescale the rotary base of the tokens that count."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    check_lossless(make_target("llama", max_position_embeddings=32, rope_parameters=rope))


def test_longrope_stays_inside_its_original_context():
    """Where transformers would switch the rotary factors of a whole batch, generation ends."""
    original = {"original_max_position_embeddings": 24}
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 2.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **original}
    model = family("Phi3Config", max_position_embeddings=64, rope_parameters=rope, **original)
    target = Target(model)
    assert target.max_positions == 24
    assert [len(tokens) for tokens in check_lossless(target)] == [15, 21, 10]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(path="/no/such/model"), "no model folder '/no/such/model'; give a folder"),
        (dict(device="toaster"), "unknown device"),
        (dict(dtype="float7"), "unknown dtype"),
    ],
)
def test_bad_loading_arguments(arguments, message):
    with pytest.raises(EagleError, match=message):
        Target.from_pretrained(**arguments)


@pytest.mark.parametrize("damage", ["weights", "config", "no weights"])
def test_damaged_model_folders(tmp_path, damage):
    make_model(make_target("llama").config).save_pretrained(tmp_path)
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    elif damage == "config":
        (tmp_path / "config.json").write_text("{not json")
    else:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EagleError, match="cannot load the target model"):
        Target.from_pretrained(tmp_path)


def test_from_pretrained_and_embedded_defaults(tmp_path):
    target = make_target("llama")
    target.model.save_pretrained(tmp_path)
    loaded = Target.from_pretrained(tmp_path, dtype="float32", device="cpu")
    prompts = make_prompts((4, 7))
    assert plain(loaded, prompts, max_new_tokens=8) == plain(target, prompts, max_new_tokens=8)
    model = EaModel.from_pretrained(str(tmp_path), dtype="fp32", device="cpu")
    assert model.drafter is None
    with pytest.raises(EagleError, match="is an EAGLE-3 head; leave use_eagle3 unset"):
        EaModel.from_pretrained(use_eagle3=False)
    with pytest.raises(EagleError, match="total_token"):
        EaModel.from_pretrained(str(tmp_path), total_token=1)
