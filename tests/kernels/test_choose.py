"""One choice a node, from its own logits and its own noise."""

import pytest
import torch

from kernels.choose import choose, gumbel_noise, process_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    logits = torch.randn(1, 1, 50).expand(400, 1, 50)
    positions = torch.zeros(400, 1, dtype=torch.int64)
    for options in (dict(top_k=3), dict(top_p=0.3), dict(min_p=0.5)):
        kept = process_logits(logits[0, 0], 2.0, **options).isfinite()
        chosen = choose(logits, torch.arange(400), positions, temperature=2.0, **options).unique()
        assert kept[chosen].all() and len(chosen) > 1
