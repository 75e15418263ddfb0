"""What is taught where: shift of the mask, normalisation, and the loss functions."""

import pytest
import torch
from head_helpers import tiny_head

from configs.schema import LossConfig
from train.head.losses import overlap, token_losses
from train.head.metrics import COLUMNS, depth_metrics
from train.head.ttt import Teacher, UnrolledHead, plan_unroll

H, V, D = 32, 60, 24


def distributions(rows=50, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, D).softmax(-1), torch.randn(rows, D)


def fake_batch(mask, seed=0):
    """Random features, embeddings and a teacher that is a function of (row, source)."""
    generator = torch.Generator().manual_seed(seed)
    B, T = mask.shape
    features = torch.randn(B, T, 3 * H, generator=generator)
    embeds = torch.randn(B, T, H, generator=generator)
    everywhere = torch.randn(B, T, D, generator=generator).softmax(-1)
    best = torch.randint(0, V, (B, T), generator=generator)
    return features, embeds, everywhere, best


def run(module, mask, data, totals=None):
    features, embeds, everywhere, best = data
    plan = plan_unroll(mask, module.steps)
    at = (plan.rows, plan.sources)
    known = best[at] % 5 != 0
    teacher = Teacher(everywhere[at], best[at], known)
    return module(
        features, embeds, plan, teacher, plan.counts.float() if totals is None else totals
    )


def make(steps=3, loss=None):
    return UnrolledHead(tiny_head(), steps, 0.8, loss or LossConfig(), amp=False)


def test_focal_without_gamma_is_soft_ce():
    p, logits = distributions()
    soft, _ = token_losses(p, logits, LossConfig())
    focal, _ = token_losses(p, logits, LossConfig(name="focal", gamma=0.0))
    torch.testing.assert_close(focal, soft)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_fades_as_the_overlap_grows(gamma):
    p, logits = distributions()
    far, near = logits, p.log() + 1e-3 * logits
    cfg = LossConfig(name="focal", gamma=gamma)
    ratio = [
        (token_losses(p, x, cfg)[0] / token_losses(p, x, LossConfig())[0]).mean().item()
        for x in (far, near, p.log())
    ]
    assert ratio[0] > 0.05 > ratio[1] > ratio[2] >= 0 and ratio[2] < 1e-2


def test_the_target_prob_weight_does_not_fade_on_soft_targets():
    p, _ = distributions()
    cfg = LossConfig(name="focal", weight="target_prob")
    kept = token_losses(p, p.log(), cfg)[0] / token_losses(p, p.log(), LossConfig())[0]
    assert kept.mean() > 0.5


@pytest.mark.parametrize("name", ["kl", "overlap"])
def test_a_perfect_head_has_no_loss(name):
    p, logits = distributions()
    perfect, accepted = token_losses(p, p.log(), LossConfig(name=name))
    assert perfect.abs().max() < 1e-5 and torch.allclose(accepted, torch.ones_like(accepted))
    assert (token_losses(p, logits, LossConfig(name=name))[0] > 0.01).all()


def test_kl_and_soft_ce_have_the_same_gradient():
    p, logits = distributions()
    grads = []
    for name in ("kl", "soft_ce"):
        x = logits.clone().requires_grad_()
        token_losses(p, x, LossConfig(name=name, label_smoothing=0.1))[0].sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_overlap_is_the_acceptance_rate():
    p, logits = distributions()
    q = logits.softmax(-1)
    expected = 1 - 0.5 * (p - q).abs().sum(-1)  # one minus the total variation
    torch.testing.assert_close(overlap(p, logits.log_softmax(-1)), expected)


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
        found = sorted(plan.positions[row][reached[row]].tolist())
        expected = [t for t in range(14) if t + 2 + steps - 1 < 14 and mask[row, t + 1 + steps]]
        assert found == expected


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
    # two starts: both right at depth 0, one of them at depth 1; a third target is outside the vocabulary
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
