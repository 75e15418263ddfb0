"""A randomly initialised target and head of real geometry, made on the device itself: nothing is
read or fetched.

Knows shapes; random weights say nothing of acceptance, which is forced.
"""

from __future__ import annotations

import torch

from eagle.draft import HeadDrafter
from eagle.heads.head import Eagle3Head, HeadConfig
from eagle.target import Target
from eagle.tree import TreeShape

from .sizes import Geometry, require_memory


def random_target(shape: Geometry, dtype: torch.dtype, device: torch.device) -> Target:
    """A target of `shape` on `device`, weights N(0, 0.02)."""
    from transformers import AutoModelForCausalLM

    require_memory(device, 2 * parameters(shape) * dtype.itemsize)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    fill(model)
    # an identity given, so that none is computed from the weights
    return Target(model, shape.name, identity={"id": shape.name, "weights": "random"})


def random_drafter(target: Target, draft_vocab: int, tree: str) -> HeadDrafter:
    """An EAGLE-3 head of one layer for it."""
    config = HeadConfig.for_target(target.config, draft_vocab_size=draft_vocab)
    with torch.device(target.device):
        head = Eagle3Head(config).to(target.dtype)
    fill(head)
    if head.config.reduced_vocab:
        step = target.vocab_size // draft_vocab
        head.set_draft_vocab(torch.arange(draft_vocab) * step)  # takes ids of the host
    head.eval().requires_grad_(False)
    return HeadDrafter(head, target.embed, TreeShape.parse(tree))


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.02)


def parameters(shape: Geometry) -> int:
    """Of a Llama-shaped model, output layer not tied."""
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + (
        2 * shape.hidden * shape.vocab
    )


def read_bytes(module: torch.nn.Module, embedding: torch.nn.Module | None) -> int:
    """Bytes of weights that a pass reads: all but the embedding table, of which it reads a few
    rows.
    """
    left_out = set() if embedding is None else {id(p) for p in embedding.parameters()}
    return sum(p.nbytes for p in module.parameters() if id(p) not in left_out)
