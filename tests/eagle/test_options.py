"""What a request may ask for means what transformers means by it, in trees too."""

import pytest
import torch
from engine_helpers import (
    ScriptedDrafter,
    engines,
    head_model,
    make_head,
    make_prompts,
    make_target,
    make_tokenizer,
    new_tokens,
    padded,
    plain,
    stock_greedy,
)
from transformers import GenerationConfig, LogitsProcessor

from eagle.errors import EagleError
from eagle.model import EaModel
from eagle.options import Options

NEW = 24
PROMPTS = make_prompts((9, 3, 14, 1))


@pytest.fixture(scope="module")
def answers(llama):
    return plain(llama, PROMPTS, max_new_tokens=NEW)


def stock(target, prompts, asked):
    """transformers' own continuations under a GenerationConfig."""
    ids = [torch.tensor([prompt]) for prompt in prompts]
    with target.stock() as model, torch.no_grad():
        got = [
            model.generate(x, attention_mask=torch.ones_like(x), generation_config=asked)
            for x in ids
        ]
    return [line[0, x.shape[1] :].tolist() for x, line in zip(ids, got, strict=True)]


def config(**values):
    return GenerationConfig(**{"max_new_tokens": NEW, "pad_token_id": 0, **values})


def configs(answers):
    """Each changes, or cuts, the answers of at least one prompt."""
    first = answers[0]
    rare = [t for t in first if all(t not in a[:6] for a in answers[1:])]
    bad = [[first[3]], first[6:8], answers[1][2:5], [answers[2][0]]]
    yield "penalty", config(repetition_penalty=1.7)
    yield "bonus", config(repetition_penalty=0.7)
    yield "ngram", config(no_repeat_ngram_size=2)
    yield "one gram", config(no_repeat_ngram_size=1)
    yield "eos", config(eos_token_id=rare[:2])
    yield "min new tokens", config(eos_token_id=[first[2], answers[1][4]], min_new_tokens=11)
    yield "bad words and eos", config(bad_words_ids=[*bad, [first[4]]], eos_token_id=first[4])
    yield "suppressed", config(suppress_tokens=[first[0], first[5], answers[3][1]])
    yield "length", GenerationConfig(max_length=15, pad_token_id=0)
    several = dict(repetition_penalty=1.4, no_repeat_ngram_size=3, bad_words_ids=bad)
    ends = dict(eos_token_id=[first[4], answers[2][3]], min_new_tokens=7)
    yield "all", config(suppress_tokens=[first[1]], **several, **ends)


NAMES = [name for name, _ in configs([list(range(NEW))] * 4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_config_gives_what_stock_generate_gives(llama, answers, name):
    asked = dict(configs(answers))
    # of those whose lengths leave room for new tokens
    prompts = PROMPTS[:3] if name == "length" else PROMPTS
    expected = stock(llama, prompts, asked[name])
    assert expected != answers[: len(prompts)]
    for model in engines(llama, expected):
        result = model.generate(prompts, generation_config=asked[name])
        assert new_tokens(result) == expected
    model = head_model(llama)
    many = model.generate_many(prompts, slots=2, generation_config=asked[name])
    assert [row.tokens for row in many] == expected
    sampled = dict(generation_config=asked[name], temperature=1.1, top_p=0.95, seed=21)
    assert new_tokens(model.generate(prompts, **sampled)) == plain(llama, prompts, **sampled)
    # as arguments they mean the same
    names = Options.model_fields.keys() & vars(asked[name]).keys()
    options = {n: v for n in names if (v := getattr(asked[name], n)) is not None}
    assert new_tokens(model.generate(prompts, **options)) == expected
    how = dict(custom_generate=model.custom_generate, generation_config=asked[name])
    ids = torch.tensor(prompts[:1])
    ours = llama.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert ours[0].tolist() == prompts[0] + expected[0]


def test_arguments_win_over_a_generation_config(llama, answers):
    model = head_model(llama)
    asked = config(max_new_tokens=5, repetition_penalty=1.7, eos_token_id=answers[0][2])

    def run(given, **options):
        return new_tokens(model.generate(PROMPTS, generation_config=given, **options))

    assert run(asked, max_new_tokens=NEW, repetition_penalty=1.0, eos_token_id=-1) == answers
    endless = config(max_new_tokens=5, repetition_penalty=1.7)
    assert run(asked, eos_token_id=[]) == stock(llama, PROMPTS, endless)
    # as in transformers, a number of new tokens wins over a length of the whole
    longer = GenerationConfig(max_length=16, pad_token_id=0)
    assert run(longer, max_new_tokens=NEW) == answers
    with_both = GenerationConfig(max_length=16, max_new_tokens=NEW, pad_token_id=0)
    assert run(with_both) == stock(llama, PROMPTS, with_both) == answers

    sampling = GenerationConfig(do_sample=True, temperature=1.3, top_k=30, max_new_tokens=NEW)
    silent = GenerationConfig(temperature=1.3, top_k=30, max_new_tokens=NEW)  # asks for no sampling
    sampled = run(None, temperature=1.3, top_k=30, seed=3, max_new_tokens=NEW)
    colder = run(None, temperature=0.4, top_k=30, seed=3, max_new_tokens=NEW)
    assert len({str(x) for x in (answers, sampled, colder)}) == 3
    for given, options, expected in (
        (sampling, {}, sampled),
        (sampling, {"do_sample": False}, answers),
        (sampling, {"temperature": 0.0}, answers),
        (sampling, {"temperature": 0.4}, colder),
        (silent, {}, answers),
        (silent, {"do_sample": True}, sampled),
        (silent, {"temperature": 1.3}, sampled),
    ):
        assert run(given, seed=3, **options) == expected


class Whole(LogitsProcessor):
    """Scores that depend on every token before, in its order, and on how many there are."""

    def __call__(self, ids, scores):
        place = torch.arange(1, ids.shape[1] + 1)
        hashed = (ids * (place * 31 + 7)).sum(-1, keepdim=True) * 2654435761
        token = torch.arange(scores.shape[-1])
        noise = ((hashed ^ (token * 40503 + 17)) % 1009) / 1009
        return scores + 6 * noise


def stock_processors(model, ids):
    """One of each kind that goes with text; ids [B, T]: the prompts."""
    from transformers import SynthIDTextWatermarkingConfig
    from transformers.generation import logits_process as hf

    T, V, eos = ids.shape[1], 128, 3
    watermark = SynthIDTextWatermarkingConfig(keys=[5, 9, 31], ngram_len=3, context_history_size=8)
    return {
        "MinNewTokens": lambda: hf.MinNewTokensLengthLogitsProcessor(T, 9, eos),
        "RepetitionPenalty": lambda: hf.RepetitionPenaltyLogitsProcessor(1.6),
        "EncoderRepetitionPenalty": lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(3.0, ids),
        "TopK": lambda: hf.TopKLogitsWarper(1),
        "NoRepeatNGram": lambda: hf.NoRepeatNGramLogitsProcessor(2),
        "EncoderNoRepeatNGram": lambda: hf.EncoderNoRepeatNGramLogitsProcessor(1, ids),
        "SequenceBias": lambda: hf.SequenceBiasLogitsProcessor(
            [[[t], 9.0] for t in (7, 8)] + [[[7, 8], -30.0]]
        ),
        "NoBadWords": lambda: hf.NoBadWordsLogitsProcessor([[5], [7, 8]]),
        "PrefixConstrained": lambda: hf.PrefixConstrainedLogitsProcessor(
            lambda row, sent: [(int(sent[-1]) * 3 + 5 * row + k) % V for k in range(4)], 1
        ),
        "ForcedEOS": lambda: hf.ForcedEOSTokenLogitsProcessor(T + 11, eos),
        "ExponentialDecay": lambda: hf.ExponentialDecayLengthPenalty((2, 1.4), eos, T),
        "SuppressAtBegin": lambda: hf.SuppressTokensAtBeginLogitsProcessor(range(100), T),
        "UnbatchedClassifierFreeGuidance": lambda: (
            hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, model, ids.flip(1))
        ),
        "Watermark": lambda: hf.WatermarkLogitsProcessor(V, "cpu", bias=8.0),
        "SynthID": lambda: watermark.construct_processor(V, "cpu"),
        "reads the whole context": Whole,
        "counts its calls": Counting,
        "reads the first row": lambda: (
            lambda seen, scores: scores.index_fill(-1, seen[0, -3:] % V, -1e9)
        ),
        "knows its row": ByRow,
    }


class Counting(LogitsProcessor):
    """Keeps state: at the n-th call it bans what is left over of n."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        return scores.index_fill(-1, torch.arange(self.calls % 3, 128, 3), -1e9)


class ByRow(LogitsProcessor):
    """A bias a row of the batch, which it must be shown whole."""

    def __call__(self, ids, scores):
        assert len(ids) == len(scores) == 3
        return scores + 12 * torch.eye(3, scores.shape[1]).roll(40, 1)


SAME_LENGTH = make_prompts((7, 7, 7), seed=3)
UNEVEN = [[t or 1 for t in p] for p in make_prompts((9, 3, 6))]  # 0 is the padding
CASES = [(name, SAME_LENGTH) for name in stock_processors(None, torch.ones(1, 1))]
CASES += [(name, UNEVEN) for name in ("RepetitionPenalty", "MinNewTokens", "NoRepeatNGram")]
CASES += [("UnbatchedClassifierFreeGuidance", UNEVEN)]


@pytest.mark.parametrize("name, prompts", CASES)
def test_processors_of_a_batch_do_what_they_do_in_stock_generate(llama, name, prompts):
    """Also where they look at the row's number, at its padding, at one row, or keep state."""
    ids, mask = padded(prompts, "left")
    make = stock_processors(llama.model, ids)[name]
    options = dict(attention_mask=mask, max_new_tokens=18, eos_token_id=3, pad_token_id=0)
    with llama.stock() as stock_model, torch.no_grad():
        expected = stock_model.generate(ids, logits_processor=[make()], do_sample=False, **options)
    if name == "reads the first row":  # which in a batch is another's: alone it is its own
        ids, alone = ids[:1], dict(eos_token_id=3, logits_processor=[make()])
        options["attention_mask"] = mask[:1]
        expected = torch.tensor([prompts[0] + stock_greedy(llama, prompts[0], 18, **alone)])
    answers = [line[mask.shape[1] :] for line in expected.tolist()]
    answers = [a[: a.index(3) + 1] if 3 in a else a for a in answers]
    right, wrong = (
        EaModel(llama, drafter=ScriptedDrafter(answers, well, "16,4,4")) for well in (True, False)
    )
    for model in (right, wrong, head_model(llama)):
        got, _, cycles = model.eagenerate(ids, logits_processor=[make()], log=True, **options)
        assert torch.equal(got, expected)
        assert model is not right or cycles <= 3 * len(
            ids
        )  # it ran on deep nodes, not on the roots alone
    how = dict(custom_generate=head_model(llama).custom_generate, do_sample=False)
    ours = llama.model.generate(ids, logits_processor=[make()], **how, **options)
    assert torch.equal(ours, expected)
    sampled = dict(temperature=1.2, seed=4, **options)
    slow = EaModel(llama).naivegenerate(ids, logits_processor=[make()], **sampled)
    fast = head_model(llama).eagenerate(ids, logits_processor=[make()], **sampled)
    assert torch.equal(fast, slow)


def test_a_shared_constraint_knows_each_requests_number(llama):
    make = stock_processors(llama.model, torch.tensor(SAME_LENGTH))["PrefixConstrained"]
    model, options = head_model(llama), dict(max_new_tokens=12, logits_processor=[make()])
    rows = model.generate_many(SAME_LENGTH, slots=2, **options)
    slow = model.generate(SAME_LENGTH, **options)
    assert [row.tokens for row in rows] == new_tokens(slow)


def stock_logprobs(target, row):
    """log_softmax of the stock model's logits at the places that chose the row's new tokens."""
    with target.stock() as model, torch.no_grad():
        logits = model(torch.tensor([row.context])).logits[0].float()
    chosen = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
    return chosen.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]


WAYS = ("greedy", "sampled", "processed", "eos", "stop", "limit")


@pytest.mark.parametrize("family, way", [*(("llama", way) for way in WAYS), ("gemma2", "sampled")])
def test_logprobs(targets, family, way):
    """They are the target's own, whatever processors and cut-offs chose the token, and end with the
    tokens."""
    target, text = targets(family), make_tokenizer()
    answers = plain(target, PROMPTS, max_new_tokens=NEW)
    own = {
        "greedy": {},
        "sampled": {"temperature": 1.3, "top_p": 0.9, "seed": 5},
        "processed": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
        "eos": {"eos_token_id": [answers[0][6], answers[1][3], answers[2][0]]},
        "stop": {"stop_strings": [text.decode(a)[5:7] for a in answers]},
        "limit": {"max_new_tokens": 7},
    }[way]
    options = {"max_new_tokens": NEW, "logprobs": True, **own}
    for model in engines(target, answers):
        model._tokenizer = text
        result = model.generate(PROMPTS, **options)
        for row in result.rows:
            assert len(row.logprobs) == len(row.tokens)
            found = torch.tensor(row.logprobs)
            assert torch.allclose(found, stock_logprobs(target, row), atol=1e-4)
        shortest = min(len(row.tokens) for row in result.rows)
        assert (shortest < NEW) == (way in ("eos", "stop", "limit"))


REFUSED = dict(num_beams=4, num_return_sequences=2, penalty_alpha=0.6, typical_p=0.9, max_time=1.0)
REFUSED |= dict(sequence_bias=[[[5], -1.0]], forced_eos_token_id=5, renormalize_logits=True)
REFUSED |= dict(exponential_decay_length_penalty=(3, 1.1))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(llama, name):
    asked = GenerationConfig()
    setattr(asked, name, REFUSED[name])
    with pytest.raises(EagleError, match=f"asks for {name}="):
        EaModel(llama).eagenerate(PROMPTS, generation_config=asked)


ENDS = [{"top_p": 0.0}, {"min_p": 1.0, "top_k": 0}, {"top_k": 0, "top_p": 1.0}]
ENDS += [{"top_k": None}, {"min_length": 15}]


@pytest.mark.parametrize("asked", ENDS, ids=str)
def test_a_generation_config_means_what_it_means_in_transformers(llama, answers, asked):
    """Cut-offs at their ends keep the likeliest token, where as plain arguments 0 is off."""
    asked = config(do_sample=True, **asked)
    model, ids = head_model(llama), torch.tensor(PROMPTS[:1])
    greedy = asked.top_p == 0.0 or asked.min_p == 1.0
    torch.manual_seed(1)
    ours = model.eagenerate(ids, generation_config=asked)
    torch.manual_seed(1)
    prepared = llama.model.generate(
        ids, custom_generate=model.custom_generate, generation_config=asked
    )
    assert torch.equal(ours, prepared) and (ours[0, 9:].tolist() == answers[0]) == greedy
    if greedy:
        assert stock(llama, PROMPTS[:1], asked) == answers[:1]
        off = model.eagenerate(ids, temperature=1.0, top_p=0.0, seed=1, max_new_tokens=NEW)
        assert off[0, 9:].tolist() != answers[0]


def test_the_lengths_of_a_generation_config(llama, answers):
    ended = dict(pad_token_id=0, eos_token_id=answers[0][2])
    for asked in (
        GenerationConfig(**ended),
        GenerationConfig(**{**GenerationConfig._get_default_generation_params(), **ended}),
        GenerationConfig(min_length=18, **ended),
        GenerationConfig(max_length=15, **ended),
        GenerationConfig(min_length=18, max_length=16, max_new_tokens=14, **ended),
        GenerationConfig(min_length=30, min_new_tokens=6, max_new_tokens=14, **ended),
    ):
        expected = stock(llama, PROMPTS[:1], asked)
        result = head_model(llama).generate(PROMPTS[:1], generation_config=asked)
        assert new_tokens(result) == expected
    assert len(expected[0]) == 14 or expected[0][-1] == answers[0][2]


def test_the_padding_of_a_generation_config(llama, answers):
    asked = GenerationConfig(eos_token_id=answers[0][1], pad_token_id=99, max_new_tokens=6)
    for options, pad in (({}, 99), ({"pad_token_id": 98}, 98)):
        ids = EaModel(llama).naivegenerate(PROMPTS[:2], generation_config=asked, **options)
        new = answers[0][: answers[0].index(answers[0][1]) + 1]
        assert ids[0].tolist() == PROMPTS[0] + new + [pad] * (ids.shape[1] - 9 - len(new))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_options_on_a_gpu(answers):
    """Processors hold tensors of their own, which must be where the logits are."""
    target = make_target("llama")
    target.model.cuda()
    model = EaModel(target, make_head(target).cuda(), "8,4,2")
    asked = dict(configs(answers))["all"]
    result = model.generate(PROMPTS, generation_config=asked, logprobs=True)
    assert all(len(row.logprobs) == len(row.tokens) > 0 for row in result.rows)
