"""Stock models behind our attention and cache: same logits, honest positions, and clear
refusals."""

import pytest
import torch
import transformers
from engine_helpers import (
    BASE,
    FAMILIES,
    ScriptedDrafter,
    head_model,
    make_model,
    make_prompts,
    make_target,
    make_tree,
    new_tokens,
    plain,
    stock_greedy,
)

from eagle.errors import EagleError
from eagle.heads.head import HeadConfig, default_feature_layers
from eagle.model import EaModel
from eagle.target import Target

SMALL = {k: v for k, v in BASE.items() if k != "head_dim"}


def family(name, **changes):
    return make_model(getattr(transformers, name)(**{**SMALL, **changes}))


def entering(target, hidden_states):
    """The features below the last layer's output, of which transformers only gives the normed
    form."""
    assert target.feature_layers == (1, 2, 4)
    return torch.cat([hidden_states[i] for i in (1, 2)], dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_and_features_are_those_of_transformers(targets, name):
    target = targets(name)
    (prompt,) = make_prompts((17,))
    ids = torch.tensor([prompt])
    with target.stock() as model:
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    length = torch.tensor([17])
    logits, features = target.prefill(ids, length, [17], target.new_cache(1, 17), features=True)
    assert torch.allclose(logits[0, 0], out.logits[0, -1], atol=1e-4)
    hidden, again = target.hidden_and_features(ids, torch.ones_like(ids))
    assert torch.allclose(again, features, atol=1e-4)
    expected = entering(target, out.hidden_states)
    assert torch.allclose(features[..., : expected.shape[-1]], expected, atol=1e-4)
    assert torch.allclose(hidden, out.hidden_states[-1], atol=1e-4)
    assert torch.allclose(target.head_logits(hidden), out.logits, atol=1e-4)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 4), (2, 3, 4), (4, 4, 4), (3, 1, 0)])
@torch.inference_mode()
def test_any_feature_layers(layers):
    target = make_target("llama")
    target.set_feature_layers(layers)
    before_norm = []
    target.backbone.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    ids = torch.tensor(make_prompts((5,)))
    with target.stock() as model:
        states = list(
            model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:4]
        )
    states.append(
        before_norm[0]
    )  # what leaves the last layer; transformers' own last state is normed
    _, features = target.prefill(ids, torch.tensor([5]), [5], target.new_cache(1, 5), features=True)
    assert torch.allclose(features, torch.cat([states[i] for i in layers], -1), atol=1e-5)
    for bad in ((0, 1), (0, 1, 5), (-1, 1, 2)):
        with pytest.raises(EagleError, match="feature layers"):
            target.set_feature_layers(bad)


def test_default_feature_layers():
    assert default_feature_layers(32) == (2, 16, 29) and default_feature_layers(16) == (2, 8, 13)
    for layers in range(2, 12):
        ids = default_feature_layers(layers)
        assert len(set(ids)) == 3 and list(ids) == sorted(ids) and 0 <= ids[0] and ids[-1] <= layers
    with pytest.raises(EagleError, match="three feature layers"):
        default_feature_layers(1)


@pytest.mark.parametrize("layers", [2, 3])
def test_shallow_models_work(layers):
    target = make_target("llama", num_hidden_layers=layers)
    prompts = make_prompts((5, 3))
    result = head_model(target).generate(prompts, max_new_tokens=12)
    assert new_tokens(result) == plain(target, prompts, max_new_tokens=12)


def ragged_cache(target, prompts, capacity):
    cache = target.new_cache(len(prompts), capacity)
    lengths = [len(p) for p in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    target.prefill(ids, torch.tensor(lengths), lengths, cache, features=False)
    return cache


TREE = [
    (9, 0),
    (4, 0),
    (7, 0),
    (5, 1),
    (6, 1),
    (4, 2),
    (8, 3),
    (1, 5),
    (2, 6),
]  # tokens and parents, depth 4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(6, 6), (9, 2, 13)], ids=["even", "ragged"])
@torch.inference_mode()
def test_tree_logits_equal_every_path_on_its_own(targets, name, lengths):
    target = targets(name)
    prompts = make_prompts(lengths)
    cache = ragged_cache(target, prompts, 30)
    tree = make_tree([TREE] * len(prompts), 4)
    logits, features = target.verify_tree(tree.tokens, tree.depth, tree.mask, cache, features=True)
    with target.stock() as model:
        for b, prompt in enumerate(prompts):
            for n in range(len(TREE)):
                path = [TREE[m][0] for m in tree.mask[b, n].nonzero()[:, 0]]
                out = model(
                    input_ids=torch.tensor([prompt + path]),
                    output_hidden_states=True,
                    use_cache=False,
                )
                assert torch.allclose(logits[b, n], out.logits[0, -1], atol=1e-4)
                expected = entering(target, out.hidden_states)[0, -1]
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


def test_dynamic_rope_at_the_end_of_the_context():
    """Drafts past the limit must not rescale the rotary base of the tokens that count."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    check_lossless(make_target("llama", max_position_embeddings=32, rope_parameters=rope))


def test_longrope_stays_inside_its_original_context():
    """Where transformers would switch the rotary factors of a whole batch, generation ends."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "factor": 2.0,
    }
    model = family(
        "Phi3Config",
        max_position_embeddings=64,
        rope_parameters=rope,
        original_max_position_embeddings=24,
    )
    target = Target(model)
    assert target.max_positions == 24
    slow = check_lossless(target)
    assert [len(tokens) for tokens in slow] == [15, 21, 10]


def test_head_config_follows_the_target(targets):
    for name in FAMILIES:
        target = targets(name)
        config = HeadConfig.for_target(target.config, draft_vocab_size=40)
        assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (1e4, 8, 2)
        assert config.feature_layers == target.feature_layers
    with pytest.raises(EagleError, match="divisor"):
        HeadConfig.for_target(target.config, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(EagleError, match="draft_vocab_size"):
        HeadConfig.for_target(target.config, draft_vocab_size=500)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(path="/no/such/model"), "no model folder '/no/such/model'; give a folder"),
        (dict(device="toaster"), "unknown device"),
        (dict(dtype="float7"), "unknown dtype"),
    ],
    ids=["path", "device", "dtype"],
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
