"""Sampling follows the target's distribution; the noise is what it claims to be."""

import pytest
import torch
from engine_helpers import head_model, make_prompts, make_target, plain
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eagle.errors import EagleError
from eagle.sampling import row_seeds
from kernels.choose import gumbel_noise, mix32, process_logits

V = 12


def chi_square_p(counts, expected):
    """P(chi-square >= observed), cells below 5 expected pooled into one."""
    small = expected < 5
    if small.any() and small.sum() < len(expected):
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
        keep = expected > 0
        counts, expected = counts[keep], expected[keep]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    if freedom < 1:
        return 1.0
    return 1 - torch.special.gammainc(torch.tensor(freedom / 2.0), statistic / 2).item()


@pytest.fixture(scope="module")
def small():
    return make_target("llama", vocab_size=V, pad_token_id=None, initializer_range=0.2)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 5)])
def test_each_position_follows_the_target(small, temperature, top_k):
    """Many seeds of one prompt; at each position, given the commonest prefix, a chi-square test."""
    prompt, rows = [3, 7, 1], 6000
    model = head_model(small, "8,4,2", draft_vocab=V)
    options = dict(max_new_tokens=4, temperature=temperature, top_k=top_k, seed=123)
    result = model.generate([prompt] * rows, **options)
    outputs = torch.tensor([row.tokens for row in result.rows])
    prefix = torch.empty(0, dtype=torch.int64)
    for position in range(4):
        matching = outputs[(outputs[:, :position] == prefix).all(1)]
        assert len(matching) > 60
        with small.stock() as stock, torch.no_grad():
            logits = stock(input_ids=torch.tensor([prompt + prefix.tolist()])).logits[0, -1]
        wanted = process_logits(logits, temperature, top_k).softmax(-1).double()
        counts = torch.bincount(matching[:, position], minlength=V).double()
        assert (counts[wanted == 0] == 0).all()
        assert chi_square_p(counts, wanted * len(matching)) > 1e-3, position
        prefix = torch.cat([prefix, counts.argmax()[None]])


def test_noise_is_gumbel_and_independent():
    noise = gumbel_noise(torch.arange(40), torch.arange(50).expand(40, 50), 100)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    uniform = (-(-noise.double()).exp()).exp()
    cells = torch.histc(uniform.float(), 50, 0, 1).double()
    assert chi_square_p(cells, torch.full((50,), uniform.numel() / 50.0).double()) > 1e-3
    assert abs(noise.mean().item() - 0.5772) < 0.01 and abs(noise.var().item() - 1.6449) < 0.03
    centred = uniform - 0.5
    for axis in range(3):  # neighbouring seeds, positions and tokens
        a, b = (centred.narrow(axis, start, uniform.shape[axis] - 1) for start in (0, 1))
        assert abs((a * b).mean().item() * 12) < 0.01
        pairs = torch.stack([(a + 0.5).flatten(), (b + 0.5).flatten()], 1)
        cells = (pairs * 8).long().clamp_max(7)
        counts = torch.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64).double()
        assert chi_square_p(counts, torch.full((64,), len(pairs) / 64.0).double()) > 1e-3


def test_noise_depends_on_seed_position_and_token_alone():
    seeds = torch.tensor([5, -3, 2**40, 2**63 - 1])
    positions = torch.tensor([[1, 2, 900], [2, 7, 8], [0, 1, 2], [4, 4, 4]])
    noise = gumbel_noise(seeds, positions, 30)
    assert torch.equal(noise, gumbel_noise(seeds, positions, 30))
    assert torch.equal(noise, gumbel_noise(seeds, positions, 50)[..., :30])
    assert torch.equal(noise[2:3, 1:2], gumbel_noise(seeds[2:3], positions[2:3, 1:2], 30))
    assert torch.equal(noise[3, 0], noise[3, 2])


def test_all_64_bits_of_the_seed_count():
    seeds = torch.tensor([1, 1 + 2**32, 1 + 2**33, 1 - 2**63, 1 + 2**62, 2**32, 0, -1])
    noise = gumbel_noise(seeds, torch.zeros(len(seeds), 1, dtype=torch.int64), 64)
    assert len({tuple(row) for row in noise[:, 0].tolist()}) == len(seeds)
    x = torch.cat([torch.arange(20000), 2**32 - 1 - torch.arange(20000)])
    y = mix32(x)  # a bijection
    assert y.unique().numel() == x.numel() and y.min() >= 0 and y.max() < 2**32


WARPERS = [dict(temperature=1.0, top_k=k) for k in (0, 1, 5, 500)]
WARPERS += [dict(temperature=0.7, top_p=p) for p in (0.01, 0.5, 0.999)]
WARPERS += [dict(temperature=1.0, min_p=0.1)]
WARPERS += [dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05)]


@pytest.mark.parametrize("params", WARPERS, ids=str)
def test_warpers_are_those_of_transformers(params):
    torch.manual_seed(0)
    expected = logits = torch.randn(64, 90) * 3
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        expected = warper(params[name])(None, expected) if params.get(name) else expected
    ours = process_logits(logits, **params)
    assert torch.equal(ours == float("-inf"), expected == float("-inf"))
    assert torch.allclose(ours, expected)
    three = process_logits(logits.reshape(4, 16, 90), **params)
    assert torch.equal(three.reshape(64, 90), ours)


def test_zero_and_one_are_off(llama):
    prompts = make_prompts((4, 7))
    options = dict(max_new_tokens=8, temperature=1.3, seed=3)
    outputs = [
        plain(llama, prompts, **options, top_p=top_p, top_k=top_k)
        for top_p in (0.0, 1.0)
        for top_k in (0, 128)
    ]
    assert all(output == outputs[0] for output in outputs)
    one = plain(llama, prompts, **options, top_k=1)
    assert one == plain(llama, prompts, max_new_tokens=8)


def test_extremes_are_the_same_alone_and_in_company(llama):
    """What float32 cannot hold is rounded before anyone sees it; none of it is off, and none is an
    infinite score."""
    extremes = [
        {"temperature": 1e-46},
        {"temperature": 1e-38},
        {"temperature": 3e38},
        {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "min_p": 1e-50},
        {"temperature": 1.0, "top_p": 1 - 1e-12},
        {"temperature": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 2**62},
        {"temperature": 0.9, "top_k": 3},
    ]
    prompts = make_prompts([5 + i for i in range(len(extremes))])
    requests = [{"input_ids": p, "seed": 7, **e} for p, e in zip(prompts, extremes, strict=True)]
    model = head_model(llama, "8,4,2", draft_vocab=128)
    rows = model.generate_many(requests, slots=len(requests), max_new_tokens=12)
    alone = [model.generate([r], max_new_tokens=12, draft=False).rows[0].tokens for r in requests]
    assert [row.tokens for row in rows] == alone
    greedy = [plain(llama, [p], max_new_tokens=12)[0] for p in prompts]
    same = [i for i in range(10) if alone[i] == greedy[i]]
    assert same == [0, 1, 3, 6, 7]


def test_seeds():
    assert row_seeds(5, 3) == [5, 6, 7] and row_seeds([9, 1], 2) == [9, 1]
    assert len(set(row_seeds(None, 4))) == 4
    for bad in ("1", 1.5, [1, 2, 3], ["a", "b"], True, [2**63, 0], 2**63 - 1, -(2**63) - 1):
        with pytest.raises(EagleError, match="seed"):
            row_seeds(bad, 2)
