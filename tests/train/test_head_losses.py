"""What is taught where: shift of the mask, normalisation, and the settings of the loss."""

import pytest
import torch
from head_helpers import mask_of, tiny_head

from configs.schema import LossConfig
from kernels.draft_loss import Objective
from train.head.metrics import COLUMNS, depth_metrics
from train.head.teacher import objective_of
from train.head.ttt import UnrolledHead, plan_unroll

H, V, D = 32, 60, 24


def fake_batch(mask, seed=0):
    """Random features, embeddings, and a teacher's logits and choice for every (row, source)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*mask.shape, size, generator=generator) for size in (3 * H, H, D)]
    return *parts, torch.randint(-4, D, mask.shape, generator=generator).clamp_min(-1)


def run(module, mask, data, totals=None):
    plan = plan_unroll(mask, module.steps)
    features, embeds, everywhere, best = (x.flatten(0, 1) for x in data)
    logits, choices = everywhere[plan.sources], best[plan.sources]

    def teacher(start, stop):
        return logits[start:stop], choices[start:stop]

    totals = plan.counts.float() if totals is None else totals
    return module(features, embeds, plan, teacher, totals)


def make(steps=3, loss=None):
    return UnrolledHead(tiny_head(), steps, 0.8, loss or LossConfig(), amp=False)


def test_the_settings_reach_the_loss():
    shape = {"gamma": 0.5, "alpha": 0.25, "weight": "target_prob", "label_smoothing": 0.1}
    found = objective_of(LossConfig(name="focal", focal_over="kl", **shape))
    assert found == Objective("kl", 0.5, 0.25, "target_prob", 0.1)
    assert objective_of(LossConfig(name="kl", **shape)) == Objective("kl", smoothing=0.1)


def test_depth_weights():
    mask, by_step = mask_of(14, (5, 11), (5, 11)), []
    for only in range(3):
        module = make(3, LossConfig(depth_weights=[float(i == only) for i in range(3)]))
        by_step.append(float(run(module, mask, fake_batch(mask))[0].detach()))
    whole = float(run(make(), mask, fake_batch(mask))[0].detach())
    assert whole == pytest.approx(sum(0.8**i * x for i, x in enumerate(by_step)), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_last_step_has_gradient_exactly_where_its_token_is_supervised(steps):
    mask = mask_of(14, (6, 9), (11, 14))  # up to the right edge
    module, kept = make(steps), []
    unroll = module.unroll

    def recorded(*args):
        for hidden in unroll(*args):
            hidden.retain_grad()
            kept.append(hidden)
            yield hidden

    module.unroll = recorded
    data = fake_batch(mask)
    data[3][:] = 1  # a token of the draft vocabulary everywhere: nothing is left out
    loss, _ = run(module, mask, data)
    loss.backward()
    plan = plan_unroll(mask, steps)
    reached = kept[-1].grad.abs().sum(-1) > 0
    for row in range(2):
        found = plan.positions[reached & (plan.chain_rows == row)].tolist()
        expected = [t for t in range(14) if t + 2 + steps - 1 < 14 and mask[row, t + 1 + steps]]
        assert found == expected


@pytest.mark.parametrize("targets", [False, True])
def test_what_the_head_cannot_propose_has_zero_loss_and_zero_gradient(targets):
    """Tokens outside the draft vocabulary; and a second token, as nothing precedes what precedes
    it."""
    mask, module = mask_of(10, (4, 9) if targets else (1, 2)), make()
    data = fake_batch(mask)
    data[3][:] = -1
    loss, sums = run(module, mask, data)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert sums[..., COLUMNS.index("known")].sum() == 0
    assert (sums[..., COLUMNS.index("targets")].sum() > 0) == targets


def test_loss_ignores_padding_and_what_stands_there():
    mask = mask_of(12, (3, 6), (7, 12), (2, 4))
    module, data = make(), fake_batch(mask)
    loss, sums = run(module, mask, data)
    wider = torch.cat([mask, torch.zeros(3, 7, dtype=torch.bool)], 1)
    more = [torch.cat([x, torch.full_like(x[:, :7], 3)], 1) for x in data]
    again, more_sums = run(module, wider, more)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(more_sums, sums)


def test_loss_and_gradient_do_not_change_with_the_split_into_micro_batches():
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    data = fake_batch(mask)
    whole, parts = make(), make()
    loss, _ = run(whole, mask, data)
    loss.backward()
    totals = plan_unroll(mask, 3).counts.float()
    total = 0.0
    for rows in ([0], [1, 2, 3], [4, 5]):
        part, _ = run(parts, mask[rows], [x[rows] for x in data], totals)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_metrics_of_a_known_chain():
    # two starts: both right at depth 0, one of them at depth 1; a third target is outside the
    # vocabulary
    first = {"targets": 4, "known": 3, "right": 2, "asked": 4, "held": 2}
    second = {"targets": 4, "known": 4, "right": 1, "asked": 2, "held": 1}
    sums = torch.tensor([[depth.get(name, 0.0) for name in COLUMNS] for depth in (first, second)])
    m = depth_metrics(sums, [1.0, 0.8])
    assert m["accuracy_by_depth"] == [0.5, 0.25] and m["acceptance_by_depth"] == [0.5, 0.5]
    assert m["tau_simulated"] == pytest.approx(1 + 0.5 + 0.25) and m["outside_draft_vocab"] == 1
