"""A random target and head of real geometry, and its steps and cycles in CUDA graphs.

Times do not depend on the weights, and as a random head is never right, cycles keep the longest
path of their tree. Off a GPU there are no graphs and the same passes run eagerly.
"""

from __future__ import annotations

import torch

from eagle.draft import HeadDrafter
from eagle.heads.head import Eagle3Head, HeadConfig
from eagle.static_cycle import StaticCycle
from eagle.target import Target
from eagle.tree import TreeShape
from inference.bench.gpu_kernels import copy_bandwidth
from inference.bench.timing import capture, milliseconds

LLAMA_8B = {  # Llama-3.1-8B, for transformers' LlamaConfig
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Graphs:
    """`plain` and `cycle` are cases of the GPU suite; `facts` and `copy` the constants of a
    floor."""

    def __init__(
        self, shape: dict, draft_vocab: int, device: torch.device, repeats: int, copy_bytes: int
    ) -> None:
        self.device, self.repeats = device, repeats
        self.target = random_target(shape, device)
        self.drafter = random_drafter(self.target, draft_vocab)
        target, head = self.target, self.drafter.head
        target.set_feature_layers(head.config.feature_layers)
        kv = 2 * target.kv_heads * target.head_dim * target.dtype.itemsize
        embedding = sum(p.nbytes for p in target.embed.parameters())
        self.facts = {
            "layers": len(target.layers),
            "copy_bytes_per_second": copy_bandwidth(copy_bytes, device, repeats),
            # a pass reads a few rows of the embedding table only
            "target_bytes": sum(p.nbytes for p in target.model.parameters()) - embedding,
            "head_bytes": sum(p.nbytes for p in head.parameters()),
            "kv_bytes_per_token": len(target.layers) * kv,
        }

    def plain(self, rows: int, context: int, capacity: int) -> dict:
        static = StaticCycle(self.target, None, rows, capacity)
        return {"ms": self.timed([static.cache], context, static.step)}

    def cycle(self, rows: int, context: int, capacity: int, tree: str) -> dict:
        """floor_ms: target, head and live keys and values read once at the copy's bandwidth;
        floor_by_pass_ms: the head's weights once for each of its passes."""
        facts, shape = self.facts, TreeShape.parse(tree)
        self.drafter.reshape(shape)
        static = StaticCycle(self.target, self.drafter, rows, capacity, shape.levels)
        with torch.inference_mode():  # something for the head to go on from
            static.drafter.last.normal_()
            static.drafter.first.copy_(static.drafter.first.normal_().log_softmax(-1))
        ms = self.timed(static.caches, context, static.step)
        live = rows * context * facts["kv_bytes_per_token"]
        once = facts["target_bytes"] + facts["head_bytes"] + live
        by_pass = once + shape.depth * facts["head_bytes"]
        floor, floor_by_pass = (1e3 * n / facts["copy_bytes_per_second"] for n in (once, by_pass))
        floors = {"floor_ms": floor, "floor_by_pass_ms": floor_by_pass, "vs_floor": ms / floor}
        return {"ms": ms, **floors}

    @torch.inference_mode()
    def timed(self, caches: list, context: int, work) -> float:
        """Milliseconds of `work` in a graph, `context` tokens live in every row at its start."""
        for cache in caches:
            cache.buffer.normal_()
            cache.lengths.fill_(context)
        at = caches[0].lengths.clone()

        @torch.inference_mode()
        def step() -> None:
            work()
            for cache in caches:
                cache.lengths.copy_(at)

        return milliseconds(capture(step, self.device), self.device, self.repeats)


def random_target(shape: dict, device: torch.device) -> Target:
    """Weights N(0, 0.02), made on the device itself: nothing is read or fetched."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    # an identity given, so that none is computed from the weights
    return Target(fill(model), "random", identity={"id": "random", "weights": "random"})


def random_drafter(target: Target, draft_vocab: int) -> HeadDrafter:
    config = HeadConfig.for_target(target.config, draft_vocab_size=draft_vocab)
    with torch.device(target.device):
        head = fill(Eagle3Head(config).to(target.dtype))
    step = target.vocab_size // draft_vocab
    head.set_draft_vocab(torch.arange(draft_vocab) * step)  # takes ids of the host
    return HeadDrafter(head.eval().requires_grad_(False), target.embed, TreeShape.parse("60,7,10"))


@torch.no_grad()
def fill(module: torch.nn.Module) -> torch.nn.Module:
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.02)
    return module
