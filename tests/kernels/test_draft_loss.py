"""The tiled draft loss against its specification: values, gradients and peak memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.draft_loss import Objective, draft_loss, draft_loss_reference, tile_loss_reference

LOSSES = ("soft_ce", "kl", "reverse_kl", "overlap", "total_variation")
OBJECTIVES = [Objective(name) for name in LOSSES]
OBJECTIVES += [Objective(name, 1.5, 0.7, inner) for name, inner in itertools.product(LOSSES, ("overlap", "target_prob"))]  # fmt: skip
OBJECTIVES += [Objective("soft_ce", smoothing=0.2), Objective("kl", 2.0, smoothing=0.1)]


def problem(S, U, H, D, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, U, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(D, H, generator=g) / H**0.5).requires_grad_()
    logits = 2 * torch.randn(U, D, generator=g)
    choices = torch.where(torch.rand(U, generator=g) < 0.8, logits.argmax(-1), -1)
    importance = torch.rand(S, U, generator=g) * (torch.rand(S, U, generator=g) < 0.7)

    def teacher(start, stop):
        return logits[start:stop].to(dtype), choices[start:stop]

    return hidden, weight, teacher, importance


def both(arguments, objective, tile):
    found = []
    for function, more in ((draft_loss_reference, ()), (draft_loss, (tile,))):
        hidden, weight = (x.detach().clone().requires_grad_() for x in arguments[:2])
        out = function(hidden, weight, *arguments[2:], objective, *more)
        (3 * out.total).backward()
        found.append((out, hidden.grad, weight.grad))
    return found


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    "S, U, H, D, tile", [(3, 17, 8, 37, 250), (1, 1, 5, 3, 1), (4, 9, 16, 64, 10**6)]
)
def test_equals_the_specification(objective, S, U, H, D, tile):
    """fp32: relative 1e-4, absolute 1e-5, values and gradients alike."""
    (a, a_hidden, a_weight), (b, b_hidden, b_weight) = both(problem(S, U, H, D), objective, tile)
    close = dict(rtol=1e-4, atol=1e-5)
    for name in ("total", "loss", "overlap"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), **close)
    assert torch.equal(a.right, b.right) and torch.equal(a.known, b.known)
    torch.testing.assert_close(b_hidden, a_hidden, **close)
    torch.testing.assert_close(b_weight, a_weight, **close)


def test_nothing_to_teach():
    hidden, weight, teacher, importance = problem(2, 5, 4, 6)
    out = draft_loss(hidden, weight, teacher, 0 * importance, Objective())
    out.total.backward()
    assert out.total == 0 and not hidden.grad.any() and not weight.grad.any()
    empty = draft_loss(hidden[:, :0], weight, teacher, importance[:, :0], Objective())
    assert empty.total == 0 and empty.loss.shape == (2, 0)


def test_half_precision_stays_close():
    hidden, weight, teacher, importance = problem(2, 33, 16, 50, dtype=torch.bfloat16)
    exact = draft_loss(hidden.float(), weight, teacher, importance, Objective())
    half = draft_loss(hidden, weight, teacher, importance, Objective(), 200)
    half.total.backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(half.total, exact.total, rtol=0.02, atol=0.02)


def test_it_can_be_differentiated_once():
    out = draft_loss(*problem(1, 4, 4, 6), Objective())
    out.total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        out.total.backward()


class Peak(TorchDispatchMode):
    """The most bytes of storages that operators made and that were alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += self.alive[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key):
        self.now -= self.alive.pop(key, 0)


def peak_of(function, *more):
    hidden, weight, teacher, importance = problem(1, 2048, 16, 32768)
    with Peak() as seen:
        function(hidden, weight, teacher, importance, Objective(), *more).total.backward()
    return seen.peak


@pytest.mark.slow
def test_peak_memory_is_a_third_of_the_naive_one_at_most():
    """2,048 tokens, 32,768 draft tokens, loss and backward, the inputs not counted."""
    assert peak_of(draft_loss) <= 0.35 * peak_of(draft_loss_reference)


def test_the_tile_writes_its_gradient_out():
    g = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 7, 19, generator=g), torch.randn(7, 19, generator=g)
    importance = torch.rand(2, 7, generator=g)
    *_, slope = tile_loss_reference(logits, teacher, importance, Objective("overlap"), True)
    assert slope.shape == logits.shape
    assert slope.sum(-1).abs().max() < 1e-5  # softmax: pushing all logits up changes nothing
    assert tile_loss_reference(logits, teacher, importance, Objective("overlap"), False)[3] is None
