"""Speculative output equals plain output token for token, and plain greedy output equals
transformers'."""

import itertools
import shutil

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

from eagle.errors import EagleError
from eagle.loading import identity_of
from eagle.model import EaModel
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
    """Every family, tree, sampling and form, not in all combinations."""
    batch = itertools.cycle(BATCHES)
    vocab = itertools.cycle((48, 128, 3, 128))
    for f, family in enumerate(FAMILIES):
        for i in range(f % 2, 6, 2):
            case = family, TREES[(f + i // 2) % 4], SAMPLING[i], FORMS[(2 * f + i) % 4]
            yield pytest.param(*case, next(batch), next(vocab), id=f"{family}-{i}")


@pytest.mark.parametrize("family, tree, sampling, form, batch, vocab", cases())
def test_eagle_equals_plain(targets, family, tree, sampling, form, batch, vocab):
    target = targets(family)
    prompts = make_prompts()[:batch]
    if isinstance(sampling.get("seed"), list):
        sampling = {**sampling, "seed": sampling["seed"][:batch]}
    model = head_model(target, tree, draft_vocab=vocab)
    inputs = (prompts,) if form == "lists" else padded(prompts, form)
    fast = model.eagenerate(*inputs, max_new_tokens=NEW, **sampling)
    slow = model.naivegenerate(*inputs, max_new_tokens=NEW, **sampling)
    assert torch.equal(fast, slow)
    given = prompts if form == "lists" else inputs[0].tolist()
    for line, prompt in zip(fast.tolist(), given, strict=True):
        assert line[: len(prompt)] == prompt
        assert line[len(prompt) + NEW :] == [0] * (len(line) - len(prompt) - NEW)
    assert len({tuple(line) for line in fast.tolist()}) == batch


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
    # in an order of their own, and fewer, they are the same rows
    some = head_model(target).generate([prompts[i] for i in (2, 0)], max_new_tokens=40)
    assert new_tokens(some) == [answers[2], answers[0]]
    assert result.rows[0].cycles == 7 < result.rows[2].cycles < result.rows[1].cycles


EDGES = [(1, "60,7,10"), (2, "16,0,4"), (128, "2,0,1"), (128, "2,7,10"), (5, "500,2,10")]


@pytest.mark.parametrize("vocab, tree", EDGES)
def test_head_with_fewer_tokens_than_beams_and_shallow_trees(llama, vocab, tree):
    prompts = make_prompts()
    model = EaModel(llama, make_head(llama, vocab), tree)
    answers = plain(llama, prompts, max_new_tokens=12)
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


needs_kernels = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@needs_kernels
@pytest.mark.parametrize("family", [*FAMILIES, "fp16"])
def test_drafts_change_no_token_in_16_bits(family):
    """With no near tie allowed for: each row alone, plainly, and all of them with every tree."""
    dtype = torch.float16 if family == "fp16" else torch.bfloat16
    target = Target(make_target("llama" if family == "fp16" else family).model.to(dtype))
    model, prompts = head_model(target), make_prompts()
    for sampling in ({}, {"temperature": 1.0}):
        options = dict(max_new_tokens=NEW, **sampling)
        alone = [plain(target, [p], seed=[i], **options)[0] for i, p in enumerate(prompts)]
        for tree in TREES:
            result = model.generate(prompts, tree=tree, seed=list(range(5)), **options)
            assert result.exact and new_tokens(result) == alone


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_are_a_target_like_another(dtype, compile_cache):
    """Plain alone and drafted in company, eager and compiled (which round a little differently):
    one answer."""
    options = dict(dtype=dtype, device="cpu", quantization="int8_cpu", exact=True)
    model = EaModel.from_pretrained(**options)
    assert model.target.identity["quantization"] == "int8_cpu"
    assert identity_of(model.base_model, "x")["quantization"] == "int8_cpu"
    prompts = make_prompts((9, 3))
    for mode in ("off", "max"):
        options = dict(max_new_tokens=NEW, compile=mode)
        alone = [new_tokens(model.generate([p], draft=False, **options))[0] for p in prompts]
        result = model.generate(prompts, **options)
        assert new_tokens(result) == alone and result.exact
    assert model.half().base_model.lm_head.weight.dtype == torch.uint8


def test_int8_on_a_cpu_refuses_what_it_is_not_for(tmp_path):
    for options, said in (
        ({"device": "cuda"}, "is for CPUs; on cuda use 'int8' or 'nf4'"),
        ({"device": "cpu", "adapter_path": tmp_path}, "takes no adapter; merge it first"),
    ):
        with pytest.raises(EagleError, match=f"quantization='int8_cpu' {said}"):
            EaModel.from_pretrained(quantization="int8_cpu", **options)


@needs_kernels
def test_what_is_not_exact_is_named(monkeypatch):
    quantized = dict(quantization="nf4", dtype="float32", device="cpu")
    with pytest.raises(EagleError, match="exact=True: the products of Linear4bit are computed"):
        EaModel.from_pretrained(exact=True, **quantized)
    with pytest.raises(EagleError, match="exact='maybe'; use 'auto', True or False"):
        EaModel.from_pretrained(exact="maybe")
    off = Target(make_target("llama").model, exact=False)
    assert not EaModel(off).generate([[5, 6]], max_new_tokens=2).exact
    monkeypatch.setattr("eagle.target.load_kernels", lambda folder: "no g++")
    with pytest.raises(
        EagleError, match="the CPU's kernels do not compile: no g.*use exact='auto'"
    ):
        Target(make_target("llama").model, exact=True)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}], ids=["greedy", "sampled"]
)
def test_embedded_model(sampling):
    from records.prompts import load_prompts

    embedded = EaModel.from_pretrained(dtype="float32", device="cpu")
    prompts = [p.ids for p in load_prompts(None, embedded.tokenizer, 3)]
    fast = embedded.generate(prompts, max_new_tokens=32, **sampling)
    assert new_tokens(fast) == plain(embedded.target, prompts, max_new_tokens=32, **sampling)
    if not sampling:
        eos = sorted(embedded.eos_token_ids)
        stock = stock_greedy(embedded.target, prompts[0], 32, eos_token_id=eos)
        assert new_tokens(fast)[0] == stock and fast.tau > 2.0
