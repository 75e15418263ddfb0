"""`EaModel` as people handle models: it leaves the caller's as it found it, and serves several
threads."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_helpers import (
    head_model,
    make_config,
    make_head,
    make_model,
    make_prompts,
    make_tokenizer,
    new_tokens,
    padded,
    plain,
    stock_greedy,
)
from families import SERVED

from eagle import EagleError, EaModel
from eagle.heads.pack import pack_head
from eagle.target import Target
from eagle.tree import TreeShape

PROMPTS = make_prompts((9, 3, 14))
NEW = 20


def state(model):
    """All that a caller could find changed."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [c._attn_implementation for c in configs],
        [getattr(c, "sliding_window", None) for c in configs],
        [len(getattr(m, h)) for m in model.modules() for h in hooks],
        [set(vars(m)) - {"_eagle_engines"} for m in model.modules()],
    )


def in_training(name="llama", attention="eager"):
    """A model as a training loop holds it, part of it frozen."""
    model = make_model(make_config(name)).train()
    model.set_attn_implementation(attention)
    model.get_input_embeddings().requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "nemotron"])
def test_the_model_is_left_as_it_was_found(family, tmp_path):
    if family == "nemotron":  # whose layers drop arguments: ours are carried past them by hooks
        model = next(f for f in SERVED if f.model_type == "nemotron").build().train()
    else:
        model = in_training(family)
    before = state(model)
    target = Target(model)
    assert state(model) == before
    engine, ids = head_model(target), torch.tensor(PROMPTS[:1])
    for _ in engine.ea_generate(PROMPTS, max_new_tokens=8):
        assert state(model) == before  # between two steps too
    engine.target.hidden_and_features(ids)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = model.generate(ids, custom_generate=engine.custom_generate, **options)
    assert state(model) == before
    folder = tmp_path / "packed"
    pack_head(engine.head, folder, to="eagle", license="mit", base_model="a/b", provenance={})
    options |= dict(custom_generate=str(folder), trust_remote_code=True)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), ours) and state(model) == before
    assert ours[0, 9:].tolist() == stock_greedy(target, PROMPTS[0], 6)
    with pytest.raises(IndexError):
        target.hidden_and_features(torch.tensor([[10**6]]))
    assert state(model) == before


def test_generating_in_a_training_loop_changes_no_gradient():
    def gradients(generate):
        model = in_training()
        engine = head_model(Target(model))
        if generate:
            engine.eagenerate(PROMPTS, max_new_tokens=8)
        model(torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "sampled"]
)
def test_threads_take_turns(llama, sampling):
    """On one model, on another head over the same target that reads other layers, and on a bare
    one."""
    head = make_head(llama, seed=5)
    head.config = head.config.model_copy(update={"feature_layers": (0, 1, 4)})
    first, other, bare = head_model(llama), EaModel(llama, head, "8,4,2"), EaModel(llama)
    jobs = [
        (m, p)
        for seed, m in enumerate((first, first, other, bare))
        for p in make_prompts((9, 14, 1), seed=seed)
    ]
    expected = [m.naivegenerate([p], max_new_tokens=NEW, **sampling).tolist() for m, p in jobs]

    def drafted(job):
        *_, last = job[0].ea_generate([job[1]], max_new_tokens=NEW, **sampling)
        return last.tolist()

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(drafted, jobs)) == expected


def test_handled_as_models_are(llama):
    model = head_model(llama)
    answer = model.eagenerate(PROMPTS, max_new_tokens=NEW)
    assert model.eval() is model.train(False) is model
    with pytest.raises(EagleError, match="only generates"):
        model.train()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.config is llama.model.config and model.base_model is llama.model
    assert next(model.parameters()).device == model.device
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert other.base_model is not model.base_model
        assert torch.equal(other.eagenerate(PROMPTS, max_new_tokens=NEW), answer)
        with torch.no_grad():
            for weight in other.base_model.parameters():
                weight.zero_()  # nothing is shared
    assert torch.equal(model.eagenerate(PROMPTS, max_new_tokens=NEW), answer)
    moved = copy.deepcopy(model)
    assert moved.to(torch.bfloat16) is moved and moved.dtype == torch.bfloat16
    assert moved.head.fc.weight.dtype == torch.bfloat16
    assert moved.target.identity["dtype"] == "bfloat16"
    assert new_tokens(moved.generate(PROMPTS, max_new_tokens=4))
    assert moved.cpu().float().to("cpu").half().dtype is torch.float16


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_padded_tensor_gives_what_stock_generate_gives(llama, side, masked):
    """The input as given, and the answers from column T on. Without a mask the pad token marks the
    padding."""
    prompts = [[t or 1 for t in p] for p in PROMPTS]
    ids, mask = padded(prompts, side)
    given = (ids, mask) if masked else (ids,)
    answers = plain(llama, prompts, max_new_tokens=NEW, eos_token_id=-1)
    eos = answers[0][4]
    expected = plain(llama, prompts, max_new_tokens=NEW, eos_token_id=eos)
    model, T = head_model(llama), ids.shape[1]
    options = dict(max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0, do_sample=False)
    options["attention_mask"] = mask if masked else None
    for out in (
        model.eagenerate(*given, max_new_tokens=NEW, eos_token_id=eos),
        model.naivegenerate(*given, max_new_tokens=NEW, eos_token_id=eos),
        list(model.ea_generate(*given, max_new_tokens=NEW, eos_token_id=eos))[-1],
        model.generate(*given, max_length=T + NEW, eos_token_id=eos).sequences,
        llama.model.generate(ids, custom_generate=model.custom_generate, **options),
    ):
        assert torch.equal(out[:, :T], ids)
        width = max(map(len, expected))
        assert out[:, T:].tolist() == [a + [0] * (width - len(a)) for a in expected]
    if side == "left":
        with llama.stock() as stock, torch.no_grad():
            theirs = stock.generate(ids, **options)
        assert torch.equal(out, theirs)


def test_a_pad_token_that_ends_a_text_marks_no_padding(llama):
    ids = torch.tensor([[0, 5, 9, 0]])
    out = head_model(llama).eagenerate(ids, max_new_tokens=6, eos_token_id=[0, 3])
    lists = head_model(llama).eagenerate(ids.tolist(), max_new_tokens=6, eos_token_id=[0, 3])
    assert out[0].tolist() == lists[0].tolist()


def test_upstreams_arguments(llama):
    older = dict(Type="LLaMA", threshold=1.0, total_token=-1, torch_dtype=torch.float32)
    model = EaModel.from_pretrained(use_eagle3=True, low_cpu_mem_usage=True, **older)
    assert model.tree == "auto" and model.dtype == torch.float32
    assert EaModel.from_pretrained(total_token=8, depth=3).tree == TreeShape(8, 3, 4)
    assert EaModel.from_pretrained().tree == TreeShape(16, 4, 4)
    for wrong, said in (
        ({"threshold": 0.5}, "threshold"),
        ({"tree": "8,4,2", "total_token": 16}, "total_token say two"),
        ({"tree": "auto", "top_k": 4}, "top_k say two"),
        ({"load_in_3bit": True}, "load_in_3bit"),
    ):
        with pytest.raises(EagleError, match=said):
            EaModel.from_pretrained(**wrong)
    model = head_model(llama)
    ids = model.eagenerate(
        PROMPTS, temperature=0.0, top_p=0.0, top_k=0.0, max_new_tokens=9, max_length=2048, log=False
    )
    assert torch.equal(ids, model.naivegenerate(PROMPTS, max_new_tokens=9))
    model._tokenizer = make_tokenizer()
    with pytest.raises(EagleError, match="eot_id"):
        model.eagenerate(PROMPTS, is_llama3=True)
    end = model.naivegenerate(PROMPTS[:1], max_new_tokens=9)[0, 9 + 4].item()
    model.tokenizer.get_vocab = lambda: {"<|eot_id|>": end}
    out = model.eagenerate(PROMPTS[:1], max_new_tokens=9, is_llama3=True)
    *_, last = model.ea_generate(PROMPTS[:1], max_new_tokens=9, is_llama3=True)
    assert out[0, -1] == end and torch.equal(last, out)
