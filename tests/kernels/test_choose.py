"""One choice a node, from its own logits and its own noise: the reference, and in the interpreter's
process the kernel."""

import pytest
import torch
from kernel_helpers import PARAMETERS

from kernels import choose as module
from kernels.choose import choose, gumbel_noise, process_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_greedy_is_the_argmax(dtype):
    logits = torch.randn(2, 5, 33).to(dtype)
    got = choose(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(got, logits.float().argmax(-1)) and got.dtype == torch.int64


def test_each_node_on_its_own():
    logits = torch.randn(2, 4, 20)
    seeds, positions = torch.tensor([7, 8]), torch.tensor([[3, 4, 4, 5], [9, 10, 10, 11]])
    options = dict(temperature=0.9, top_k=9, top_p=0.95, min_p=0.01)
    together = choose(logits, seeds, positions, **options)
    for b in range(2):
        for n in range(4):
            scores = process_logits(logits[b, n], **options)
            noise = gumbel_noise(seeds[b : b + 1], positions[b : b + 1, n : n + 1], 20)[0, 0]
            assert together[b, n] == (scores + noise).argmax()
    # order, batch and tree do not matter
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(
        choose(logits[:, order], seeds, positions[:, order], **options), together[:, order]
    )
    assert torch.equal(choose(logits[1:], seeds[1:], positions[1:], **options), together[1:])


def test_what_is_cut_is_never_chosen():
    # close to each other, so that each cut leaves several
    logits = torch.linspace(0, 2, 50).flip(0).expand(12, 1, 50)
    positions = torch.zeros(12, 1, dtype=torch.int64)
    for options in (dict(top_k=3), dict(top_p=0.3), dict(min_p=0.5)):
        kept = process_logits(logits[0, 0], 2.0, **options).isfinite()
        chosen = choose(logits, torch.arange(12), positions, temperature=2.0, **options).unique()
        assert kept[chosen].all() and len(chosen) > 1


def kept_by_definition(scores, top_k, top_p, min_p):
    """One row, one token at a time, in double precision."""
    V = len(scores)
    above = [sum(other > score for other in scores) for score in scores]
    in_k = [not 0 < top_k < V or above[i] < top_k for i in range(V)]
    weight = [(score - max(scores)).double().exp().item() for score in scores]
    total = sum(w for w, inside in zip(weight, in_k, strict=True) if inside)
    kept = []
    for i, score in enumerate(scores):
        before = sum(w for w, other in zip(weight, scores, strict=True) if other > score) / total
        in_p = not 0 < top_p < 1 or before < top_p
        kept.append(in_k[i] and in_p and (min_p == 0 or weight[i] >= min_p))
    return torch.tensor(kept)


# top-k, top-p, min-p
MIXES = [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 0.0, 0.0), (0, 0.3, 0.0), (0, 0.93, 0.0), (9, 0.6, 0.0)]
MIXES += [(4, 0.99, 0.07), (0, 1.0, 0.3), (30, 0.5, 0.0), (31, 1.0, 0.0), (99, 0.8, 0.01)]


@pytest.mark.parametrize("ties", [False, True])
def test_cuts_follow_their_definition(ties):
    """Also where scores are equal, which then share one fate; as numbers and as tensors of rows."""
    logits = torch.randn(len(MIXES), 2, 31, generator=torch.Generator().manual_seed(5)) * 2
    logits = logits.round() if ties else logits
    columns = [torch.tensor(column) for column in zip(*MIXES, strict=True)]
    together = process_logits(logits, torch.full((len(MIXES),), 0.7), *columns)
    for b, mix in enumerate(MIXES):
        scores = process_logits(logits[b], 0.7, *mix)
        assert torch.equal(together[b], scores)
        for n in range(2):
            kept = kept_by_definition(logits[b, n] / 0.7, *mix)
            assert torch.equal(scores[n].isfinite(), kept), mix
            assert torch.allclose(scores[n][kept], logits[b, n][kept] / 0.7)


def test_parameters_a_row():
    """A batch of requests with their own parameters gives each what it gets alone."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 2, 50, generator=g).round(decimals=1) * 2
    seeds, positions = torch.arange(6), torch.randint(0, 99, (6, 2), generator=g)
    together = choose(logits, seeds, positions, **PARAMETERS)
    for b in range(6):
        alone = {name: column[b].item() for name, column in PARAMETERS.items()}
        one = slice(b, b + 1)
        assert torch.equal(choose(logits[one], seeds[one], positions[one], **alone), together[one])
    assert torch.equal(together[[0, 4, 5]], logits[[0, 4, 5]].argmax(-1))
    some, two = dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05), slice(2)
    number = choose(logits[two], seeds[two], positions[two], **some)
    for name in PARAMETERS:  # numbers and tensors mix
        mixed = some | {name: torch.full((2,), some[name])}
        assert torch.equal(choose(logits[two], seeds[two], positions[two], **mixed), number)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_work_that_numbers_rule_out(temperature, monkeypatch):
    """No sort without top-p; nothing but an argmax when greedy."""

    def refuse(*_, **__):
        raise AssertionError("not needed")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    if temperature == 0.0:
        monkeypatch.setattr(module, "process_logits", refuse)
        monkeypatch.setattr(module, "gumbel_noise", refuse)
    logits, positions = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
    got = choose(logits, torch.arange(2), positions, temperature=temperature, top_k=4, min_p=0.1)
    best = logits.topk(4).indices
    assert (got[..., None] == best).any(-1).all()
    assert temperature or torch.equal(got, best[..., 0])


def test_noise_is_finite_at_both_ends(monkeypatch):
    """The hash's least and largest words: rounded up to 1, a uniform would make its token win
    always."""
    positions = torch.zeros(1, 1, dtype=torch.int64)
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(module, "mix32", lambda x, word=word: torch.full_like(x, word))
        noise = gumbel_noise(torch.zeros(1, dtype=torch.int64), positions, 3)
        assert noise.isfinite().all() and (noise.abs() > 2).all() and (noise.abs() < 17).all()


def test_a_row_of_nan_stays_in_range():
    logits = torch.full((2, 1, 9), float("nan"))
    for parameters in ({}, dict(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)):
        got = choose(logits, torch.arange(2), torch.zeros(2, 1, dtype=torch.int64), **parameters)
        assert ((got >= 0) & (got < 9)).all()
