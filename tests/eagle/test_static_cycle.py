"""The cycle of fixed shapes makes the engine's tokens, and a graph can hold it."""

import torch
from engine_helpers import make_head, make_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from eagle.draft import HeadDrafter
from eagle.model import EaModel
from eagle.static_cycle import StaticCycle
from eagle.tree import TreeShape
from kernels import cpu_extension

PROMPTS = make_prompts((5, 2, 9))


def test_the_static_cycle_makes_the_engines_tokens():
    """The shipped model and head in fp32: the same tokens, and as many accepted in every cycle."""
    model = EaModel.from_pretrained(dtype=torch.float32, device="cpu", tree="8,4,2")
    texts = ["def add(a, b):\n    return", "import os\n\n\nclass Path:\n    def", "x = ["]
    prompts = [model.tokenizer(text).input_ids for text in texts]
    engine = model.generate(prompts, max_new_tokens=24, eos_token_id=-1)
    static = StaticCycle(model.target, model.drafter, len(prompts), 200)
    static.begin(prompts)
    rows = [[token] for token in static.root.tolist()]
    accepted = [[0] * len(engine.rows[0].accepted) for _ in prompts]
    while min(map(len, rows)) < 24:
        static.step()
        gained = zip(static.num_accepted.tolist(), static.tokens.tolist(), strict=True)
        for row, histogram, (count, tokens) in zip(rows, accepted, gained, strict=True):
            if len(row) < 24:
                row += tokens[: count + 1]
                histogram[count] += 1
    assert [row[:24] for row in rows] == [row.tokens for row in engine.rows]
    assert accepted == [row.accepted for row in engine.rows]
    assert engine.tau > 2  # else the head's cache could hold anything


def test_the_static_step_makes_the_plain_tokens(llama):
    model = EaModel(llama)
    expected = [row.tokens for row in model.generate(PROMPTS, max_new_tokens=12).rows]
    static = StaticCycle(llama, None, len(PROMPTS), 60)
    static.begin(PROMPTS)
    steps = [static.root.tolist()]
    for _ in range(11):
        static.step()
        steps.append(static.root.tolist())
    assert [list(row) for row in zip(*steps, strict=True)] == expected


class HostBound(TorchDispatchMode):
    """Operators for which the host waits for the device, or sends it something: a graph cannot hold
    them."""

    NAMES = ("_local_scalar_dense", "nonzero", "repeat_interleave.Tensor", "unique", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if name.startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_graph_can_hold_the_static_passes(llama, monkeypatch):
    monkeypatch.setattr(cpu_extension, "loaded", False)  # as on a GPU
    drafter = HeadDrafter(make_head(llama), llama.embed, TreeShape.parse("8,4,2"))
    static = StaticCycle(llama, drafter, len(PROMPTS), 60)
    static.begin(PROMPTS)
    plain = StaticCycle(llama, None, len(PROMPTS), 60)
    plain.begin(PROMPTS)
    static.step()  # what is made once, rotary tables for instance, is made
    with HostBound() as watch:
        static.step()
        plain.step()
    assert watch.seen == []
    with watch:
        torch.ones(2).nonzero()
        torch.tensor([1, 2])
    assert [name.split(".")[0] for name in watch.seen] == ["nonzero", "lift_fresh"]


def test_a_cycle_is_forced_to_accept(llama):
    drafter = HeadDrafter(make_head(llama), llama.embed, TreeShape.parse("6,4,1"))
    static = StaticCycle(llama, drafter, len(PROMPTS), 60, accept=3)
    static.begin(PROMPTS)
    before = static.cache.lengths.clone()
    static.step()
    assert static.num_accepted.tolist() == [3, 3, 3]
    assert torch.equal(static.cache.lengths, before + 4)
