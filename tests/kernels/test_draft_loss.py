"""The chunked draft loss equals its definition, values and gradients, and holds one tile at a
time; in the interpreter's process a tile is the kernel's."""

import pytest
import torch
from kernel_helpers import LOSSES, OBJECTIVES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.draft_loss import (
    Objective,
    draft_loss,
    draft_loss_reference,
    position_loss,
    tile_loss_reference,
)


def name(value):
    if not isinstance(value, Objective):
        return str(value)
    focal = "" if value.gamma is None else f"-focal{value.gamma}-{value.inner}"
    return f"{value.loss}{focal}" + (f"-smooth{value.smoothing}" if value.smoothing else "")


def distributions(rows=40, D=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=g) * 2, torch.randn(rows, D, generator=g)


class Problem:
    """S steps, U positions; a teacher whose choice is outside the draft vocabulary now and then."""

    def __init__(self, S, U, H, D, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(S, U, H, generator=g).to(dtype).requires_grad_()
        self.weight = torch.randn(D, H, generator=g).requires_grad_()
        self.teacher_logits = torch.randn(U, D, generator=g) * 3
        self.choices = self.teacher_logits.argmax(-1)
        self.choices[::5] = -1
        self.importance = torch.rand(S, U, generator=g)
        self.importance[0, :2] = 0
        self.asked = []

    def teacher(self, start, stop):
        self.asked.append((start, stop))
        return self.teacher_logits[start:stop], self.choices[start:stop]

    def loss(self, implementation, objective, **options):
        arguments = self.hidden, self.weight, self.teacher, self.importance
        return implementation(*arguments, objective, **options)

    def run(self, implementation, objective, **options):
        found = self.loss(implementation, objective, **options)
        gradients = torch.autograd.grad(found.total * 3, (self.hidden, self.weight))
        return found, gradients


# fp32: the same sums in another order
TOLERANCE = dict(rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("S, U, H, D", [(1, 1, 1, 1), (2, 6, 6, 70)], ids=name)
def test_chunked_equals_reference(S, U, H, D, objective):
    problem = Problem(S, U, H, D)
    expected, gradients = problem.run(draft_loss_reference, objective)
    for tile in (4 * S * D, 10**9):
        problem.asked.clear()
        found, got = problem.run(draft_loss, objective, tile=tile)
        torch.testing.assert_close(found.total, expected.total, **TOLERANCE)
        torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close(found.overlap, expected.overlap, **TOLERANCE)
        assert torch.equal(found.right, expected.right)
        assert torch.equal(found.known, expected.known)
        torch.testing.assert_close(got, gradients, **TOLERANCE)
        rows = max(1, tile // (S * D))  # the teacher is asked once for each position
        assert problem.asked == [(a, min(a + rows, U)) for a in range(0, U, rows)]


def test_gradients_against_finite_differences():
    """The written-out gradient is that of the loss itself, the focal weight held still."""
    for objective in OBJECTIVES:
        t, x = (z.double() for z in distributions(rows=3, D=7))

        def plain(z, t=t, objective=objective):
            return position_loss_double(
                t, z, Objective(objective.loss, smoothing=objective.smoothing)
            )

        x = x.requires_grad_()
        assert torch.autograd.gradcheck(plain, (x,), eps=1e-6, atol=1e-6)
        weight = 1.0
        if objective.gamma is not None:
            loss, _ = position_loss(t, x.detach(), objective)
            weight = loss.double() / plain(x.detach())
        (expected,) = torch.autograd.grad((plain(x) * weight).sum(), x)
        *_, slope = tile_loss_reference(
            x.detach().float()[None], t.float(), torch.ones(1, 3), objective, True
        )
        torch.testing.assert_close(slope[0].double(), expected, rtol=1e-4, atol=1e-5)


def position_loss_double(t, x, objective):
    """The formulas once more, in fp64 and without focal."""
    p, q = t.softmax(-1), x.softmax(-1)
    p_taught = (1 - objective.smoothing) * p + objective.smoothing / p.shape[-1]
    alpha = torch.minimum(p, q).sum(-1)
    return {
        "soft_ce": -(p_taught * q.log()).sum(-1),
        "kl": (p_taught * (p_taught / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "overlap": -alpha.log(),
        "total_variation": 1 - alpha,
    }[objective.loss]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_definition(objective):
    t, x = distributions()
    loss, overlap = position_loss(t, x, objective)
    plain = position_loss_double(
        t.double(), x.double(), Objective(objective.loss, smoothing=objective.smoothing)
    )
    p, q = t.double().softmax(-1), x.double().softmax(-1)
    alpha = 1 - 0.5 * (p - q).abs().sum(-1)  # one minus the total variation
    torch.testing.assert_close(overlap.double(), alpha, rtol=1e-5, atol=1e-6)
    if objective.gamma is not None:
        inner = alpha if objective.inner == "overlap" else (p * q).sum(-1)
        plain = objective.scale * (1 - inner) ** objective.gamma * plain
    torch.testing.assert_close(loss.double(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", [draft_loss, draft_loss_reference])
@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_and_unimportant_positions_have_no_gradient(loss, implementation):
    problem = Problem(2, 7, 12, 30)
    _, (d_hidden, _) = problem.run(implementation, Objective(loss))
    moved = d_hidden.abs().sum(-1) > 0
    assert torch.equal(moved, (problem.choices >= 0) & (problem.importance > 0))
    problem.choices[:] = -1
    found, gradients = problem.run(implementation, Objective(loss))
    assert found.total == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_far_apart_and_equal_distributions_are_finite(loss):
    """Logits so far apart that probabilities are 0 in fp32; and q = p, where min(p, q) has a
    kink."""
    t = torch.tensor([[0.0, 300.0, 0.0], [1.0, 2.0, 3.0], [-200.0, 0.0, 200.0]])
    x = torch.tensor([[300.0, 0.0, 0.0], [1.0, 2.0, 3.0], [200.0, 0.0, -200.0]])
    found, _, _, slope = tile_loss_reference(
        x[None].clone(), t, torch.ones(1, 3), Objective(loss), True
    )
    assert found.isfinite().all() and slope.isfinite().all()
    assert loss == "soft_ce" or found[0, 1].abs() < 1e-5
    assert slope[0, 1].abs().max() < 1e-5


def test_no_position_and_no_gradient_asked():
    problem = Problem(2, 0, 4, 5)
    found, gradients = problem.run(draft_loss, Objective())
    assert float(found.total) == 0 and found.loss.shape == (2, 0)
    assert [g.shape for g in gradients] == [(2, 0, 4), (5, 4)] and not gradients[1].any()
    problem = Problem(2, 9, 4, 5)
    with torch.no_grad():
        found = problem.loss(draft_loss, Objective())
    expected = problem.loss(draft_loss_reference, Objective())
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, expected.total, **TOLERANCE)


def test_a_total_is_differentiated_once():
    found = Problem(1, 5, 4, 6).loss(draft_loss, Objective())
    found.total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        found.total.backward()


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=name)
def test_a_frozen_output_layer_costs_no_gradient(objective):
    """EAGLE-1's is the target's: the states' gradient is the same, and the weight has none."""
    problem = Problem(2, 5, 6, 31)
    found, (d_hidden, _) = problem.run(draft_loss, objective, tile=64)
    problem.weight.requires_grad_(False)
    total = problem.loss(draft_loss, objective, tile=64).total
    (total * 3).backward()
    assert torch.equal(total, found.total) and torch.equal(problem.hidden.grad, d_hidden)
    assert problem.weight.grad is None


def test_half_precision_products():
    """bf16 hidden states as under autocast: fp32 losses and weight gradient, bf16 elsewhere."""
    problem = Problem(2, 50, 32, 70, dtype=torch.bfloat16)
    expected, gradients = problem.run(draft_loss_reference, Objective())
    with torch.autocast("cpu", torch.bfloat16):
        found, got = problem.run(draft_loss, Objective(), tile=1500)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, gradients, strict=True):
        assert a.dtype == b.dtype
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < 0.01  # bf16 has 8 bits


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=name)
def test_nothing_is_larger_than_a_tile_or_an_argument(objective):
    S, U, H, D = 2, 90, 8, 400
    problem = Problem(S, U, H, D)
    tile = 10 * S * D
    with Largest() as seen:
        problem.run(draft_loss, objective, tile=tile)
    # the teacher's logits of all positions are the test's own
    assert seen.elements <= max(tile, U * D) < S * U * D
    with Largest() as seen:
        problem.run(draft_loss_reference, objective)
    assert seen.elements == S * U * D
