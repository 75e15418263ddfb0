"""Stage `kernels`: how fast the kernels are, beside what else computes the same, as a share of copy
bandwidth.

Bytes are the least that must move: live keys and values once, queries, output. The L2 is cold.
Every contender runs as a CUDA graph, so that launches do not count.

B rows, N nodes, S live slots.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from kernels.choose import choose
from kernels.commit_kv import commit_kv
from kernels.tree_attention import attend, attention_bias, tree_attention, unpack_bits

from .clock import Stopwatch, capture
from .correctness import attention_problem, name
from .record import Goal, Record, found
from .sizes import Geometry, Size

SDPA = ("sdpa_folded", "sdpa_gqa")


def run(record: Record, size: Size, device: torch.device) -> list[Goal]:
    watch = Stopwatch(device, size)
    dtype = torch.bfloat16
    record.run(
        "copy",
        {"bytes": size.copy_bytes},
        lambda: {"bytes_per_second": watch.copy_bandwidth(size.copy_bytes)},
    )
    copy = next(iter(found(record.data["cases"], "copy", "bytes_per_second")), None)
    shape = size.geometries[0]
    for nodes in size.nodes:
        for batch in size.speed_batches:
            for context in size.speed_contexts:
                where = {
                    "geometry": shape.name,
                    "dtype": name(dtype),
                    "batch": batch,
                    "context": context,
                    "nodes": nodes,
                }
                record.run(
                    "tree_attention",
                    where,
                    lambda b=batch, c=context, n=nodes: attention(
                        shape, dtype, b, c, n, watch, copy, (b, c) in size.flex and n > 1
                    ),
                )
    for batch in size.speed_batches:
        where = {"geometry": shape.name, "dtype": name(dtype), "batch": batch}
        record.run("commit_kv", where, lambda b=batch: commit(shape, dtype, b, watch))
        where = {"vocab": size.vocabs[0], "dtype": name(dtype), "batch": batch}
        record.run(
            "choose",
            where,
            lambda b=batch: choices(size.vocabs[0], dtype, b, max(size.nodes), watch, copy),
        )
    return goals(record.data["cases"], device)


def goals(cases: list[dict], device: torch.device) -> list[Goal]:
    large = [
        c["of_copy_bandwidth"]
        for c in cases
        if c["kind"] == "tree_attention"
        and c.get("of_copy_bandwidth") is not None
        and c["batch"] >= 8
        and c["context"] >= 4096
    ]
    slower = [
        c["vs_best_sdpa"]
        for c in cases
        if c["kind"] == "tree_attention" and c.get("vs_best_sdpa") is not None
    ]
    return [
        Goal.judge(
            "tree_attention at batch >= 8, context >= 4k: least share of copy bandwidth",
            min(large, default=None),
            device,
            least=0.8,
        ),
        Goal.judge(
            "tree_attention: largest ratio of its time to masked SDPA's",
            max(slower, default=None),
            device,
            most=1.0,
        ),
    ]


def attention(
    shape: Geometry, dtype, batch: int, context: int, nodes: int, watch: Stopwatch, copy, flex: bool
) -> dict:
    arguments = attention_problem(shape, dtype, [context] * batch, nodes, 0, watch.device)
    q, k, v, lengths, bits, positions = arguments
    scaling, groups = shape.head_dim**-0.5, shape.heads // shape.kv_heads
    mask = unpack_bits(bits, nodes)
    bias = attention_bias(lengths, mask, positions, context + nodes, dtype)
    # ours is told nothing of the mask in advance; the others are given it ready-made
    folded, visible = bias.repeat(1, 1, groups, 1), bias == 0
    contenders = {
        "ours": lambda: tree_attention(*arguments, scaling=scaling),
        "sdpa_folded": lambda: attend(q, k, v, folded, scaling),
        "sdpa_gqa": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scaling, enable_gqa=groups > 1
        ),
    }
    if flex and watch.cuda:
        contenders["flex_attention"] = flex_attention(q, k, v, mask, context, scaling, groups)
    if watch.cuda and importlib.util.find_spec("flash_attn") is not None:
        contenders["flash_attn_causal"] = flash_attention(q, k, v, context + nodes, scaling)
    spent: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    for who, work in contenders.items():
        try:
            spent[who] = watch.device_ms(capture(work, watch.device))
        except Exception as error:  # a contender that cannot is no reason to lose the others
            if who == "ours":
                raise
            spent[who] = None
            errors[who] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    live = 2 * batch * shape.kv_heads * (context + nodes) * shape.head_dim
    moved = (live + 2 * q.numel()) * dtype.itemsize
    rate = moved / (1e-3 * spent["ours"])
    rivals = [spent[who] for who in SDPA if spent[who] is not None]
    return {
        "ms": spent,
        "errors": errors,
        "bytes": moved,
        "bytes_per_second": rate,
        "of_copy_bandwidth": rate / copy if copy else None,
        "vs_best_sdpa": spent["ours"] / min(rivals) if rivals else None,
    }


def flex_attention(q, k, v, mask, context: int, scaling: float, groups: int):
    """FlexAttention over the same tree mask, compiled for these shapes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, N = mask.shape[:2]
    S = context + N

    def visible(b, h, query, key):
        inside = key - context
        return (inside < 0) | mask[b, query, inside.clamp(min=0)]

    blocks = create_block_mask(visible, B, None, N, S, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks, scale=scaling, enable_gqa=groups > 1)


def flash_attention(q, k, v, live: int, scaling: float):
    """flash-attn knows no tree masks: causal over the same keys, for the time alone."""
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lengths = torch.full((q.shape[0],), live, dtype=torch.int32, device=q.device)
    return lambda: flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, softmax_scale=scaling, causal=True
    )


def commit(shape: Geometry, dtype, batch: int, watch: Stopwatch) -> dict:
    """Nine accepted nodes a row, keys and values of all layers at once."""
    capacity, K = 128, 9
    size = (shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_dim)
    buffer = torch.randn(size, device=watch.device, dtype=dtype)
    lengths = torch.full((batch,), 40, device=watch.device)
    counts = torch.full((batch,), K, device=watch.device)
    path = (torch.arange(K, device=watch.device) * 3).expand(batch, K).contiguous()
    work = capture(lambda: commit_kv(buffer, lengths, path, counts), watch.device)
    moved = 2 * 2 * shape.layers * batch * shape.kv_heads * (K - 1) * shape.head_dim
    return {"ms": watch.device_ms(work), "bytes": moved * dtype.itemsize}


def choices(vocab: int, dtype, batch: int, nodes: int, watch: Stopwatch, copy) -> dict:
    """Greedy, and sampled with top-p, over the logits of a tree."""
    logits = torch.randn(batch, nodes, vocab, device=watch.device, dtype=dtype)
    seeds = torch.arange(batch, device=watch.device)
    positions = torch.arange(nodes, device=watch.device).expand(batch, nodes).contiguous()
    result: dict = {"bytes": logits.numel() * dtype.itemsize}
    for kind, cut in (("greedy", {}), ("top_p", {"temperature": 0.8, "top_p": 0.9})):
        work = capture(lambda c=cut: choose(logits, seeds, positions, **c), watch.device)
        result[f"{kind}_ms"] = watch.device_ms(work)
    if copy:
        rate = result["bytes"] / (1e-3 * result["greedy_ms"])
        result["greedy_of_copy_bandwidth"] = rate / copy
    return result
