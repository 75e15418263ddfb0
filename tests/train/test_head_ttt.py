"""Unrolled training equals drafting one token at a time over a growing list of keys."""

import pytest
import torch
from head_helpers import mask_of, tiny_head

from configs.schema import LossConfig
from train.head.ttt import UnrolledHead, plan_unroll


class GrowingKeys:
    """The way of inference: every pass appends its keys and sees all of its layer."""

    def __init__(self):
        self.kept = {}

    def __call__(self, layer, q, k, v):
        before = self.kept.get(layer, (k[:, :, :0], v[:, :, :0]))
        past = before[0].shape[2]
        k, v = self.kept[layer] = [torch.cat(p, 2) for p in zip(before, (k, v), strict=True)]
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
        future = torch.arange(keys.shape[2]) > torch.arange(past, past + q.shape[2])[:, None]
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ values).transpose(1, 2)


def chain(plan, row, t):
    """Where the chain of (row, t) stands among the chains."""
    return ((plan.chain_rows == row) & (plan.positions == t)).nonzero().item()


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "kv": 2},
        {"heads": 4, "kv": 4},
        {"heads": 4, "kv": 1},
        {"num_layers": 3, "fc_norm": True, "qk_norm": True, "norm_output": True},
        {"method": "eagle1", "draft": 60},
        {"method": "eagle1", "draft": 60, "num_layers": 2},
    ],
    ids=["4-2", "4-4", "4-1", "three-layers", "eagle1", "eagle1-two-layers"],
)
def test_unrolled_equals_incremental(options):
    steps, T, H = 4, 13, 32
    head = tiny_head(**options)
    features, embeds = torch.randn(2, T, head.config.feature_size), torch.randn(2, T, H)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, 5:9], mask[1, 3], mask[1, 10:] = True, True, True
    plan = plan_unroll(mask, steps)
    module = UnrolledHead(head, steps, 0.8, LossConfig(), amp=False, output=torch.randn(60, H))
    with torch.no_grad():
        unrolled = list(module.unroll(features.flatten(0, 1), embeds.flatten(0, 1), plan))
        checked = 0
        for row in range(2):
            for t in sorted(
                {t for i in range(steps) for t in range(T - 2 - i) if mask[row, t + 2 + i]}
            ):
                keys = GrowingKeys()
                place = torch.arange(t + 1)[None]
                hidden = head.fuse(features[row : row + 1, : t + 1])
                hidden = head(hidden, embeds[row : row + 1, 1 : t + 2], place, keys)[:, -1:]
                for i in range(steps):
                    if i > 0:
                        if t + 1 + i >= T:
                            break
                        token = embeds[row : row + 1, t + 1 + i : t + 2 + i]
                        hidden = head(hidden, token, torch.tensor([[t + i]]), keys)
                    found = unrolled[i][chain(plan, row, t)]
                    torch.testing.assert_close(found, hidden[0, 0], rtol=1e-4, atol=1e-5)
                    checked += 1
    assert checked > 40


def test_no_position_sees_a_later_token():
    head, T, H = tiny_head(), 12, 32
    mask = mask_of(T, (4, 10))
    plan = plan_unroll(mask, 3)
    module = UnrolledHead(head, 3, 0.8, LossConfig(), amp=False)
    features, embeds = torch.randn(T, 3 * H), torch.randn(T, H, requires_grad=True)
    for i, hidden in enumerate(module.unroll(features, embeds, plan)):
        t = 4
        (grad,) = torch.autograd.grad(hidden[chain(plan, 0, t)].sum(), embeds, retain_graph=True)
        seen = (grad.abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        assert seen == list(range(1, t + 2 + i))


@pytest.mark.parametrize("chains", [3, 256, 600])
def test_blocks_of_a_long_row_are_one_attention(chains, monkeypatch):
    """Gradients included."""
    from train.head import attention

    found = []
    for size in (256, 10_000):
        monkeypatch.setattr("train.head.ttt.BLOCK", size)
        mask = mask_of(chains + 9, (4, 4 + chains), (5, 8))
        plan = plan_unroll(mask, 2)
        torch.manual_seed(0)
        head = tiny_head()
        module = UnrolledHead(head, 2, 0.8, LossConfig(), amp=False)
        features, embeds = torch.randn(mask.numel(), 96), torch.randn(mask.numel(), 32)
        out = torch.stack(list(module.unroll(features, embeds, plan)))
        out.pow(2).sum().backward()
        found.append((out.detach(), head.midlayer.self_attn.k_proj.weight.grad))
    assert len(plan.blocks) == 2 and attention.BLOCK == 256
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_rows_are_packed_by_their_lengths():
    """Padding changes no place among the packed tokens."""
    mask = mask_of(12, (3, 6), (4, 9))
    plan = plan_unroll(mask, 3, lengths=torch.tensor([7, 10]))
    starts = torch.tensor([0, 7])
    assert torch.equal(plan.keys[plan.chain_keys], starts[plan.chain_rows] + plan.positions)
    assert plan.last.unique().tolist() == [6, 16]
    assert plan.sources.tolist() == [2, 3, 4, 10, 11, 12, 13, 14]


def test_plan_holds_each_target_once_and_counts_steps():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()
    plan = plan_unroll(mask, 3)
    assert plan.rows.tolist() == [0, 0, 1, 1, 1]
    assert plan.sources.tolist() == [1, 3, 6 + 2, 6 + 3, 6 + 4]
    assert plan.counts.tolist() == [5, 4, 3]
