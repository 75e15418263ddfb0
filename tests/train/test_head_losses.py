"""What is taught where: shift of the mask, normalisation, and the settings of the loss."""

import pytest
import torch
from head_helpers import tiny_head

from configs.schema import LossConfig
from kernels.draft_loss import position_loss
from train.head.losses import depth_weights, feature_loss, objective_of
from train.head.metrics import COLUMNS, depth_metrics
from train.head.ttt import UnrolledHead, plan_unroll

H, V, D = 32, 60, 24


def distributions(rows=50, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, D), torch.randn(rows, D)


def losses(teacher, logits, **settings):
    return position_loss(teacher, logits, objective_of(LossConfig(**settings)))


def fake_batch(mask, seed=0):
    """Random features, embeddings, and a teacher's logits and choice for every (row, source)."""
    generator = torch.Generator().manual_seed(seed)
    B, T = mask.shape
    features = torch.randn(B, T, 3 * H, generator=generator)
    embeds = torch.randn(B, T, H, generator=generator)
    everywhere = torch.randn(B, T, D, generator=generator)
    best = torch.randint(-4, D, (B, T), generator=generator).clamp_min(-1)
    return features, embeds, everywhere, best


def run(module, mask, data, totals=None):
    plan = plan_unroll(mask, module.steps)
    features, embeds, everywhere, best = (x.flatten(0, 1) for x in data)
    logits, choices = everywhere[plan.sources], best[plan.sources]

    def teacher(start, stop):
        return logits[start:stop], choices[start:stop]

    return module(
        features, embeds, plan, teacher, plan.counts.float() if totals is None else totals
    )


def make(steps=3, loss=None):
    return UnrolledHead(tiny_head(), steps, 0.8, loss or LossConfig(), amp=False)


@pytest.mark.parametrize("over", ["soft_ce", "kl", "reverse_kl", "overlap", "total_variation"])
def test_focal_without_gamma_is_the_loss_it_is_over(over):
    teacher, logits = distributions()
    plain, _ = losses(teacher, logits, name=over)
    focal, _ = losses(teacher, logits, name="focal", focal_over=over, gamma=0.0)
    torch.testing.assert_close(focal, plain)
    scaled, _ = losses(teacher, logits, name="focal", focal_over=over, gamma=0.0, alpha=0.25)
    torch.testing.assert_close(scaled, 0.25 * plain)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_fades_as_the_overlap_grows(gamma):
    teacher, logits = distributions()
    ratio = [
        (losses(teacher, x, name="focal", gamma=gamma)[0] / losses(teacher, x)[0]).mean().item()
        for x in (logits, teacher + 1e-3 * logits, teacher)
    ]
    assert ratio[0] > 0.05 > ratio[1] > ratio[2] >= 0 and ratio[2] < 1e-2


def test_depth_weights():
    assert depth_weights(LossConfig(), 3, 0.5) == [1, 0.5, 0.25]
    assert depth_weights(LossConfig(depth_weights=[3, 2, 1]), 3, 0.5) == [3, 2, 1]
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, 5:11] = True
    by_step = []
    for only in range(3):
        weights = [0.0] * 3
        weights[only] = 1.0
        module = make(3, LossConfig(depth_weights=weights))
        by_step.append(float(run(module, mask, fake_batch(mask))[0].detach()))
    whole = float(run(make(), mask, fake_batch(mask))[0].detach())
    assert whole == pytest.approx(sum(0.8**i * x for i, x in enumerate(by_step)), rel=1e-5)


def test_feature_loss_is_smooth_l1_and_teaches_the_head_alone():
    predicted = torch.tensor([[0.0, 3.0]], requires_grad=True)
    features = torch.tensor([[0.5, 0.0]], requires_grad=True)
    loss = feature_loss(predicted, features)
    assert loss.tolist() == [pytest.approx((0.125 + 2.5) / 2)]
    loss.sum().backward()
    assert predicted.grad.tolist() == [[-0.25, 0.5]] and features.grad is None


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_last_step_has_gradient_exactly_where_its_token_is_supervised(steps):
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[0, 6:9] = True
    mask[1, 11:14] = True  # up to the right edge
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


def test_nothing_is_detached_between_the_steps():
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 5:12] = True
    module = make(3, LossConfig(depth_weights=[0, 0, 1]))
    data = fake_batch(mask)
    data[3][:] = 1
    run(module, mask, data)[0].backward()
    assert module.head.fc.weight.grad.abs().sum() > 0  # only step 0 uses it


def test_what_the_head_cannot_propose_teaches_nothing():
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 4:9] = True
    data = fake_batch(mask)
    data[3][:] = -1
    module = make()
    loss, sums = run(module, mask, data)
    loss.backward()
    assert float(loss.detach()) == 0 and not any(p.grad.any() for p in module.parameters())
    assert sums[..., COLUMNS.index("known")].sum() == 0 < sums[..., COLUMNS.index("targets")].sum()


def test_loss_ignores_padding_and_what_stands_there():
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 3:6], mask[1, 7:12], mask[2, 2:4] = True, True, True
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


def test_a_batch_without_targets_has_zero_loss_and_zero_gradient():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 1] = True  # nothing precedes what precedes it
    module = make()
    loss, _ = run(module, mask, fake_batch(mask))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_metrics_of_a_known_chain():
    # two starts: both right at depth 0, one of them at depth 1; a third target is outside the
    # vocabulary
    sums = torch.zeros(2, len(COLUMNS))
    column = {name: i for i, name in enumerate(COLUMNS)}
    first = {"targets": 4, "known": 3, "right": 2, "asked": 4, "held": 2}
    second = {"targets": 4, "known": 4, "right": 1, "asked": 2, "held": 1}
    for depth, values in enumerate([first, second]):
        for name, value in values.items():
            sums[depth, column[name]] = value
    m = depth_metrics(sums, 0.8)
    assert m["accuracy_by_depth"] == [0.5, 0.25] and m["acceptance_by_depth"] == [0.5, 0.5]
    assert m["tau_simulated"] == pytest.approx(1 + 0.5 + 0.25) and m["outside_draft_vocab"] == 1
