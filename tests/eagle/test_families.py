"""Every family of docs/families.md: drafted output is plain output is transformers' output;
refusals say why."""

import re
import shutil
import warnings
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from engine_helpers import (
    NODES,
    ScriptedDrafter,
    head_model,
    make_prompts,
    make_tree,
    new_tokens,
    plain,
    prefilled,
    stock_greedy,
)
from families import PAGE, REFUSED, SERVED, Family, with_table

from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.target import Target

NEW = 20
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 70}
TREES = {"chain": "6,4,1", "branching": "16,4,4"}


class Case:
    """One family's model, its ragged prompts, and the plain answers that everything else must
    equal."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.target = Target(family.build(), name=family.name)
        self.prompts = make_prompts((9, 3, 14))

    @cached_property
    def greedy(self) -> list[list[int]]:
        return plain(self.target, self.prompts, max_new_tokens=NEW)

    @cached_property
    def sampled(self) -> list[list[int]]:
        return plain(self.target, self.prompts, max_new_tokens=NEW, **SAMPLED)

    def drafted(self, tree: str, prompts=None, **sampling) -> list[list[int]]:
        """The rows' tokens with a random head."""
        model = head_model(self.target, TREES[tree])
        return new_tokens(model.generate(prompts or self.prompts, max_new_tokens=NEW, **sampling))


@pytest.fixture(scope="session", params=SERVED, ids=lambda family: family.name)
def case(request):
    if not request.param.present:
        pytest.skip(f"this transformers has no {request.param.name}")
    return Case(request.param)


def test_greedy(case):
    assert type(case.target.model).__name__ == case.family.model
    stock = [stock_greedy(case.target, prompt, NEW) for prompt in case.prompts]
    # a model that repeats one token, or says the same to every prompt, would prove nothing
    assert min(len(set(row)) for row in stock) >= 8 and len({tuple(r[-6:]) for r in stock}) == 3
    assert case.greedy == case.drafted("branching") == stock


def test_sampled(case):
    assert case.drafted("chain", **SAMPLED) == case.sampled != case.greedy


def test_rows_do_not_depend_on_their_batch(case):
    """Row 1 alone is row 1 of the ragged batch."""
    own = {**SAMPLED, "seed": SAMPLED["seed"] + 1}
    assert case.drafted("branching", case.prompts[1:2], **own) == case.sampled[1:2]


def test_long_accepted_paths(case):
    """An always-right drafter: every path is accepted to its end, and the text is still the
    model's."""
    for answers, tree, sampling in (
        (case.greedy, "branching", {}),
        (case.sampled, "chain", SAMPLED),
    ):
        levels = ScriptedDrafter([], True, TREES[tree]).shape.levels
        new = 1 + 3 * (levels + 1)  # the first token, then three whole cycles
        assert new <= NEW
        answers = [row[:new] for row in answers]
        model = EaModel(case.target, drafter=ScriptedDrafter(answers, True, TREES[tree]))
        result = model.generate(case.prompts, max_new_tokens=new, **sampling)
        assert new_tokens(result) == answers and result.tau == levels + 1


def differs(a, b):
    """[…, N, X] -> [N]: where two passes differ by more than rounding (MoE layers group tokens by
    expert)."""
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    return ((a - b).abs().amax((0, -1)) > 1e-6 * b.abs().max()).tolist()


@torch.inference_mode()
def test_no_leak_from_the_future(case):
    """features end with the last layer's output: what is equal there has equal logits."""
    (prompt,) = make_prompts((14,))
    _, before = prefilled(case.target, [prompt])
    for changed in (0, 8, 13):
        other = [(t + 50) % 128 if i == changed else t for i, t in enumerate(prompt)]
        _, after = prefilled(case.target, [other])
        outcome = differs(after, before)
        assert not any(outcome[:changed]) and outcome[changed]
        assert any(outcome[changed + 1 :]) == (changed < 13)


def test_which_are_exact(case):
    """On a CPU all but those that multiply in ways of their own, at any width."""
    expected = {"GPT-2": "Conv1D", "GPT-OSS": "GptOssExperts"}.get(case.family.name)
    if shutil.which("g++"):
        assert case.target.inexact == (
            expected and f"the products of {expected} are computed elsewhere"
        )


@torch.inference_mode()
def test_no_leak_between_branches(case):
    """Each node changes itself and its descendants, and nothing else in the tree."""
    cache, _ = prefilled(case.target, make_prompts((8, 5)), 9)
    tree = make_tree([NODES] * 2, 4)
    target = case.target
    before, _ = target.verify_tree(tree.tokens, tree.depth, tree.mask, cache, features=False)
    for changed in range(len(NODES)):
        tokens = tree.tokens.clone()
        tokens[:, changed] += 50
        after, _ = target.verify_tree(tokens, tree.depth, tree.mask, cache, features=False)
        assert differs(after, before) == tree.mask[0, :, changed].tolist()


@torch.inference_mode()
def test_what_training_sees(case):
    """The features of a training pass are those of decoding, and `head_logits` gives the model's
    logits."""
    (prompt,) = make_prompts((13,))
    ids = torch.tensor([prompt])
    _, features = prefilled(case.target, [prompt])
    hidden, trained = case.target.hidden_and_features(ids, torch.ones_like(ids))
    rounding = max(1e-4, 1e-5 * features.abs().max().item())
    assert torch.allclose(trained, features, rtol=1e-4, atol=rounding)
    with case.target.stock() as model:
        expected = model(input_ids=ids).logits
    assert torch.allclose(case.target.head_logits(hidden), expected, rtol=1e-4, atol=1e-4)


def family(name, **changes):
    (found,) = [f for f in SERVED if f.name == name]
    return replace(found, changes={**found.changes, **changes})


@pytest.mark.parametrize("name", ["GPT-2", "GPT-BigCode", "OPT", "BioGPT"])
def test_learned_positions_end_where_the_model_ends(name):
    """Drafts at the end of the context must not look up a position that does not exist."""
    short_case = Case(family(name, max_position_embeddings=22))
    lengths = [len(row) for row in short_case.greedy]
    assert lengths == [13, 19, 8]
    for prompt, row in zip(short_case.prompts, short_case.greedy, strict=True):
        assert stock_greedy(short_case.target, prompt, len(row)) == row
    for tree in TREES:
        assert short_case.drafted(tree) == short_case.greedy
    drafter = ScriptedDrafter(short_case.greedy, True, TREES["branching"])
    right = EaModel(short_case.target, drafter=drafter)
    result = right.generate(short_case.prompts, max_new_tokens=NEW)
    assert new_tokens(result) == short_case.greedy


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_refusals_name_the_family_the_reason_and_the_remedy(refused):
    """Or, where a newer transformers lets it in, drafted output is plain output is transformers'
    output."""
    if not refused.present:
        pytest.skip(f"this transformers has no {refused.model}")
    model = refused.build()
    kind = model.config.get_text_config().model_type
    try:
        Target(model)
    except EagleError as error:
        assert re.search(refused.match, str(error))
        assert f"models of type {kind!r}" in str(error) and "; use a " in str(error)
        return
    case = Case(refused)
    stock = [stock_greedy(case.target, prompt, NEW) for prompt in case.prompts]
    assert case.greedy == stock and case.drafted("branching") == stock
    assert case.drafted("chain", **SAMPLED) == case.sampled
    warnings.warn(f"{refused.name} works now: it belongs into SERVED", stacklevel=1)


def test_the_probe_exercises_sliding_windows():
    """transformers gives OLMoE's attention a window that its masks do not have: no window, or no
    such model."""
    with pytest.raises(EagleError, match="standard deviations"):
        Target(family("OLMoE", sliding_window=200).build())
    # as long as the model: never reached
    target = Target(family("OLMoE", sliding_window=256).build())
    assert target.config.sliding_window == 256
    target = Target(family("Gemma 2", sliding_window=100).build())
    assert target.config.sliding_window == 100
    assert [layer.self_attn.sliding_window for layer in target.layers] == [100, None] * 2


def test_the_probe_finds_mixed_tokens_and_arguments_that_are_not_honoured():
    model = family("Llama").build()
    mlp = model.model.layers[1].mlp
    hook = mlp.register_forward_hook(lambda _, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(EagleError, match="standard deviations"):
        Target(model)
    hook.remove()
    model.model.layers[2].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "block_indices": torch.zeros(1)}),
        with_kwargs=True,
    )
    with pytest.raises(EagleError, match="also needs block_indices"):
        Target(model)


def test_the_table_in_the_docs():
    if absent := [f.name for f in SERVED if not f.present]:
        pytest.skip(f"this transformers has no {', '.join(absent)}")
    page = PAGE.read_text("utf-8")
    assert with_table(page) == page, "run: .venv/bin/python tests/eagle/families.py --write"
