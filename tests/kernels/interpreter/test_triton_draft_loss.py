"""The loss of one tile in Triton's interpreter against its specification."""

import itertools

import pytest
import torch

import kernels.triton_draft_loss as module
from kernels.draft_loss import Objective, draft_loss, draft_loss_reference, tile_loss_reference
from kernels.triton_draft_loss import tile_loss_triton

LOSSES = ("soft_ce", "kl", "reverse_kl", "overlap", "total_variation")
OBJECTIVES = [Objective(name) for name in LOSSES]
OBJECTIVES += [
    Objective(name, 2.0, 0.5, inner)
    for name, inner in itertools.product(LOSSES, ("overlap", "target_prob"))
]
OBJECTIVES += [
    Objective("soft_ce", 0.0),
    Objective("soft_ce", smoothing=0.2),
    Objective("kl", smoothing=0.1),
]


def tile(S, R, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(S, R, D, generator=g).to(dtype)
    teacher = (2 * torch.randn(R, D, generator=g)).to(dtype)
    return logits, teacher, torch.rand(S, R, generator=g)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("S, R, D", [(1, 1, 3), (2, 3, 130)])
def test_against_the_reference(objective, S, R, D, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)  # several blocks a row
    logits, teacher, importance = tile(S, R, D)
    expected = tile_loss_reference(logits.clone(), teacher, importance, objective, True)
    found = tile_loss_triton(logits.clone(), teacher, importance, objective, True)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(name):
    logits, teacher, importance = tile(2, 3, 50, torch.float16)
    expected = tile_loss_reference(logits.clone(), teacher, importance, Objective(name), True)
    found = tile_loss_triton(logits.clone(), teacher, importance, Objective(name), True)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3)


def test_the_best_token_is_the_first_of_equals_and_without_gradients_logits_stay():
    logits, teacher, importance = torch.zeros(1, 2, 70), torch.randn(2, 70), torch.ones(1, 2)
    logits[0, 1, [9, 66]] = 1.0
    kept = logits.clone()
    *_, best, slope = tile_loss_triton(logits, teacher, importance, Objective(), False)
    assert best.tolist() == [[0, 9]] and slope is None and torch.equal(logits, kept)


def test_the_whole_loss_goes_through_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "tile_loss_triton", lambda *a: calls.append(1) or tile_loss_triton(*a)
    )
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 9, 8, generator=g), torch.randn(37, 8, generator=g)
    logits = torch.randn(9, 37, generator=g)
    importance, results = torch.rand(2, 9, generator=g), []
    for function in (draft_loss_reference, draft_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(
            h, w, lambda a, b: (logits[a:b], logits[a:b].argmax(-1)), importance, Objective("kl")
        )
        out.total.backward()
        results.append((out.total.detach(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert calls
