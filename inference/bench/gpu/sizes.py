"""What is measured: geometries of published models, and the settings of each stage at toy and at
full size.

Knows numbers; knows nothing of how they are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.errors import EagleError


@dataclass(frozen=True)
class Geometry:
    """The shapes of a model; kind: the transformers family whose config is built from it."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    kind: str = "llama"
    positions: int = 131072

    def config(self):
        """A transformers config of these shapes, written out here: nothing is looked up."""
        from transformers import LlamaConfig, Qwen3Config

        family = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.kind]
        return family(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


LLAMA_8B = Geometry("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256)
QWEN3_8B = Geometry("qwen3-8b", 4096, 12288, 36, 32, 8, 128, 151936, "qwen3", 40960)
# attention of all heads, and of the share that one of eight GPUs holds
LLAMA_70B = Geometry("llama-3.3-70b", 8192, 28672, 80, 64, 8, 128, 128256)
LLAMA_70B_SLICE = Geometry("llama-3.3-70b, one of eight", 8192, 3584, 80, 8, 1, 128, 128256)
TOY = Geometry("toy", 64, 128, 4, 4, 2, 16, 512, positions=4096)


@dataclass(frozen=True)
class Size:
    """Settings of all stages. nodes: of a tree; capacities: tokens a slot holds; seconds: of one
    timing at most.
    """

    name: str
    repeats: int
    seconds: float
    copy_bytes: int
    cold_bytes: int
    geometries: tuple[Geometry, ...]
    check_batches: tuple[int, ...]
    check_contexts: tuple[int, ...]
    nodes: tuple[int, ...]
    vocabs: tuple[int, ...]
    lossless_tokens: int
    speed_batches: tuple[int, ...]
    speed_contexts: tuple[int, ...]
    flex: tuple[tuple[int, int], ...]
    model: Geometry
    draft_vocab: int
    verify_nodes: tuple[int, ...]
    trees: tuple[str, ...]
    engine_batches: tuple[int, ...]
    auto_batches: tuple[int, ...]
    batch_context: int
    contexts: tuple[int, ...]
    capacities: tuple[int, int]
    context: int
    loss: tuple[int, int, int, int]  # unrolled steps, positions, hidden, vocabulary


FULL = Size(
    name="full",
    repeats=30,
    seconds=1.5,
    copy_bytes=2**32,
    cold_bytes=2**28,
    geometries=(LLAMA_8B, QWEN3_8B, LLAMA_70B, LLAMA_70B_SLICE),
    check_batches=(1, 4, 16, 64),
    check_contexts=(128, 2048, 8192, 32768),
    nodes=(1, 60),
    vocabs=(128256, 151936),
    lossless_tokens=200,
    speed_batches=(1, 8, 32, 64),
    speed_contexts=(512, 2048, 4096, 16384, 32768),
    flex=((1, 2048), (8, 4096), (32, 4096)),
    model=LLAMA_8B,
    draft_vocab=32000,
    verify_nodes=(1, 8, 16, 32, 48, 60, 64),
    trees=("60,7,10", "30,5,6", "16,4,4", "8,4,2", "5,3,1"),
    engine_batches=(1, 2, 4, 8, 16, 32, 64),
    auto_batches=(32, 1),
    batch_context=1024,
    contexts=(128, 2048, 8192, 32768),
    capacities=(4096, 65536),
    context=2048,
    loss=(3, 2048, 4096, 128256),
)
SMALL = Size(
    name="toy",
    repeats=2,
    seconds=0.2,
    copy_bytes=2**20,
    cold_bytes=2**16,
    geometries=(TOY,),
    check_batches=(1, 3),
    check_contexts=(40, 300),
    nodes=(1, 13),
    vocabs=(500,),
    lossless_tokens=12,
    speed_batches=(1, 2),
    speed_contexts=(64,),
    flex=(),
    model=TOY,
    draft_vocab=128,
    verify_nodes=(1, 8),
    trees=("8,3,2",),
    engine_batches=(1, 2),
    auto_batches=(2,),
    batch_context=24,
    contexts=(48,),
    capacities=(128, 512),
    context=40,
    loss=(2, 64, 32, 512),
)
SIZES = {"toy": SMALL, "full": FULL}


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Of the kernels. On a CPU also fp32, whose error against fp64 shows that the comparison
    works.
    """
    half = [torch.bfloat16, torch.float16]
    return half if device.type == "cuda" else [*half, torch.float32]


def require_memory(device: torch.device, needed: float) -> None:
    """Refuse what cannot fit, in words, before an allocation fails."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
        if needed > 0.92 * free:
            raise EagleError(
                f"needs {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free; use a larger GPU"
            )
