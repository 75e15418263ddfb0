"""Speculative output equals plain output token for token, and plain greedy output equals
transformers'."""

import itertools

import pytest
import torch
from engine_helpers import (
    FAMILIES,
    ScriptedDrafter,
    head_model,
    make_head,
    make_prompts,
    make_target,
    new_tokens,
    padded,
    plain,
    stock_greedy,
)

from eagle.loading import EMBEDDED
from eagle.model import EMBEDDED_HEAD, EaModel
from eagle.target import Target

NEW = 20
TREES = ("6,4,1", "8,4,2", "16,4,4", "60,7,10")
SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "seed": 2},
    {"temperature": 0.7, "top_p": 0.8, "seed": 3},
    {"temperature": 1.3, "top_k": 12, "seed": 4},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "seed": [2**62, 5, -7, 8, 9]},
)
FORMS = ("lists", "left", "right", "both")
BATCHES = (1, 2, 5)


def cases():
    """Every family with every tree, sampling and form; batch sizes and heads go round."""
    batch = itertools.cycle(BATCHES)
    vocab = itertools.cycle((48, 128, 3))
    for f, family in enumerate(FAMILIES):
        for i in range(6):
            case = family, TREES[(f + i) % 4], SAMPLING[i], FORMS[(2 * f + i) % 4]
            yield pytest.param(*case, next(batch), next(vocab), id=f"{family}-{i}")


def give(prompts, form):
    return (
        {"input_ids": prompts}
        if form == "lists"
        else dict(zip(("input_ids", "attention_mask"), padded(prompts, form), strict=True))
    )


@pytest.mark.parametrize("family, tree, sampling, form, batch, vocab", cases())
def test_eagle_equals_plain(targets, family, tree, sampling, form, batch, vocab):
    target = targets(family)
    prompts = make_prompts()[:batch]
    if isinstance(sampling.get("seed"), list):
        sampling = {**sampling, "seed": sampling["seed"][:batch]}
    model = head_model(target, tree, draft_vocab=vocab)
    inputs = give(prompts, form)
    fast = model.eagenerate(**inputs, max_new_tokens=NEW, **sampling)
    slow = model.naivegenerate(**inputs, max_new_tokens=NEW, **sampling)
    assert torch.equal(fast, slow)
    given = inputs["input_ids"] if form == "lists" else inputs["input_ids"].tolist()
    for line, prompt in zip(fast.tolist(), given, strict=True):
        assert line[: len(prompt)] == prompt
        assert line[len(prompt) + NEW :] == [0] * (len(line) - len(prompt) - NEW)
    assert len({tuple(line) for line in fast.tolist()}) == batch


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_always_right_and_always_wrong_drafters(targets, family, tree):
    target = targets(family)
    prompts = make_prompts((9, 3, 14))
    sampling = {"temperature": 1.3, "seed": 11} if tree != "8,4,2" else {}
    shape = ScriptedDrafter([], True, tree).shape
    new = 1 + 3 * (shape.levels + 1)  # the first token, then three whole cycles
    answers = plain(target, prompts, max_new_tokens=new, **sampling)
    for right, tau in ((True, shape.levels + 1), (False, 1.0)):
        drafter = ScriptedDrafter(answers, right, tree)
        result = EaModel(target, drafter=drafter).generate(prompts, max_new_tokens=new, **sampling)
        assert new_tokens(result) == answers
        assert result.tau == tau and all(row.tau == tau for row in result.rows)
        accepted = shape.levels if right else 0
        assert all(row.accepted[accepted] == row.cycles for row in result.rows)


def test_rows_at_different_speeds(targets):
    """One row drafts perfectly, one never, one by chance: lengths drift apart and nothing mixes."""
    target = targets("mistral")
    prompts = make_prompts((2, 17, 8))
    answers = plain(target, prompts, max_new_tokens=40)
    wrong = [(t + 1) % 128 for t in answers[1]]
    half = [t if i % 3 else (t + 1) % 128 for i, t in enumerate(answers[2])]
    drafter = ScriptedDrafter([answers[0], wrong, half], True, "16,4,4")
    result = EaModel(target, drafter=drafter).generate(prompts, max_new_tokens=40)
    assert new_tokens(result) == answers
    assert result.rows[0].cycles == 7 < result.rows[2].cycles < result.rows[1].cycles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 40}], ids=["greedy", "sampled"]
)
def test_a_row_alone_equals_the_row_in_a_batch(targets, family, sampling):
    model = head_model(targets(family), "8,4,2")
    prompts = make_prompts()
    together = new_tokens(model.generate(prompts, max_new_tokens=NEW, **sampling))
    for row, prompt in enumerate(prompts):
        own = {**sampling, "seed": 40 + row} if sampling else {}
        assert new_tokens(model.generate([prompt], max_new_tokens=NEW, **own)) == [together[row]]
    order = [3, 1, 4]
    some = {**sampling, "seed": [40 + i for i in order]} if sampling else {}
    subset = new_tokens(model.generate([prompts[i] for i in order], max_new_tokens=NEW, **some))
    assert subset == [together[i] for i in order]


def test_seeds_matter_and_repeat(llama):
    model = head_model(llama)
    prompt = make_prompts((5,))

    def run(seed):
        return new_tokens(model.generate(prompt, max_new_tokens=16, temperature=1.3, seed=seed))[0]

    outputs = {seed: tuple(run(seed)) for seed in (0, 1, 2**32, 2**40 + 1, 2**63 - 1, -1)}
    assert len(set(outputs.values())) == len(outputs)
    assert all(tuple(run(seed)) == output for seed, output in outputs.items())


def test_head_with_fewer_tokens_than_beams_and_shallow_trees(llama):
    prompts = make_prompts()
    answers = plain(llama, prompts, max_new_tokens=12)
    for vocab, tree in (
        (1, "60,7,10"),
        (2, "16,0,4"),
        (128, "2,0,1"),
        (128, "2,7,10"),
        (5, "500,2,10"),
    ):
        model = EaModel(llama, make_head(llama, vocab), tree)
        assert new_tokens(model.generate(prompts, max_new_tokens=12)) == answers


@pytest.mark.parametrize(
    "target_dtype, head_dtype", [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_the_head_may_have_a_dtype_of_its_own(target_dtype, head_dtype):
    """As in the evaluations of a training run, where the head is fp32 and the target is not."""
    target = make_target("llama")
    target = Target(target.model.to(getattr(torch, target_dtype)))
    head = make_head(target).to(getattr(torch, head_dtype))
    result = EaModel(target, head, "8,4,2").generate(make_prompts((4, 9)), max_new_tokens=8)
    assert result.new_tokens == 16
    if target_dtype == "float32":
        assert new_tokens(result) == plain(target, make_prompts((4, 9)), max_new_tokens=8)


@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="no embedded model in this checkout"
)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}], ids=["greedy", "sampled"]
)
def test_embedded_model(embedded, sampling):
    from records.prompts import load_prompts

    prompts = [p.ids for p in load_prompts(None, embedded.tokenizer, 3)]
    fast = embedded.generate(prompts, max_new_tokens=32, **sampling)
    slow = embedded.generate(prompts, max_new_tokens=32, draft=False, **sampling)
    assert new_tokens(fast) == new_tokens(slow)
    if not sampling:
        eos = sorted(embedded.eos_token_ids)
        stock = stock_greedy(embedded.target, prompts[0], 32, eos_token_id=eos)
        assert new_tokens(fast)[0] == stock
    if EMBEDDED_HEAD.exists() and not sampling:
        assert fast.tau > 2.0


@pytest.fixture(scope="module")
def embedded():
    if EMBEDDED_HEAD.exists():
        return EaModel.from_pretrained(dtype="float32", device="cpu")
    target = Target.from_pretrained(dtype="float32", device="cpu")
    return EaModel(target, make_head(target, 512, scale=0.02), "16,4,4")
