"""How fast the kernels are on a GPU, beside masked SDPA. Every contender runs as a CUDA graph, so
that launches do not count; the L2 is cold.

B rows, N nodes, D head_dim, V vocabulary. shape: the keywords of a transformers config.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from inference.bench.timing import capture, milliseconds
from kernels.choose import choose
from kernels.commit_kv import commit_kv
from kernels.tree_attention import attend, attention_bias, pack_bits, tree_attention, unpack_bits

DTYPE = torch.bfloat16


def copy_bandwidth(size: int, device: torch.device, repeats: int) -> float:
    """Bytes a second of a copy of `size` bytes on the device, read and written ones counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * size / milliseconds(lambda: target.copy_(source), device, repeats)


def attention(
    shape: dict, device: torch.device, repeats: int, rows: int, context: int, nodes: int
) -> dict:
    """Ours, told nothing of the mask in advance, and masked SDPA, which is given it."""
    B, N, D = rows, nodes, shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    q = torch.randn(B, N, heads, D, device=device, dtype=DTYPE).transpose(1, 2)
    k, v = torch.randn(2, B, kv_heads, context + N, D, device=device, dtype=DTYPE)
    mask = torch.rand(B, N, N, device=device) < 0.3
    mask |= torch.eye(N, dtype=torch.bool, device=device)
    lengths = torch.full((B,), context, device=device)
    positions = lengths[:, None] + torch.randint(0, 9, (B, N), device=device)
    bits, scaling = pack_bits(mask), D**-0.5
    bias = attention_bias(lengths, unpack_bits(bits, N), positions, context + N, DTYPE)
    folded, visible = bias.repeat(1, 1, heads // kv_heads, 1), bias == 0
    stock = functools.partial(F.scaled_dot_product_attention, enable_gqa=heads > kv_heads)
    works = {
        "ours": lambda: tree_attention(q, k, v, lengths, bits, positions, scaling=scaling),
        "sdpa_folded": lambda: attend(q, k, v, folded, scaling),
        "sdpa_gqa": lambda: stock(q, k, v, attn_mask=visible, scale=scaling),
    }
    ms = {name: milliseconds(capture(w, device), device, repeats) for name, w in works.items()}
    moved = (k.numel() + v.numel() + 2 * q.numel()) * DTYPE.itemsize
    return {
        "ms": ms,
        "bytes_per_second": 1e3 * moved / ms["ours"],
        "vs_best_sdpa": ms["ours"] / min(ms["sdpa_folded"], ms["sdpa_gqa"]),
    }


def small_kernels(shape: dict, B: int, N: int, device: torch.device, repeats: int) -> dict:
    """commit_kv of nine nodes a row, all layers; choices over the logits of a tree."""
    layers, kv_heads = shape["num_hidden_layers"], shape["num_key_value_heads"]
    size = (layers, 2, B, kv_heads, 128, shape["head_dim"])
    buffer = torch.randn(size, device=device, dtype=DTYPE)
    lengths, counts = torch.full((B,), 40, device=device), torch.full((B,), 9, device=device)
    path = (torch.arange(9, device=device) * 3).expand(B, 9).contiguous()
    logits = torch.randn(B, N, shape["vocab_size"], device=device, dtype=DTYPE)
    positions = torch.arange(N, device=device).expand(B, N).contiguous()
    pick = functools.partial(choose, logits, torch.arange(B, device=device), positions)
    works = {
        "commit_kv_ms": lambda: commit_kv(buffer, lengths, path, counts),
        "greedy_ms": pick,
        "top_p_ms": functools.partial(pick, temperature=0.8, top_p=0.9),
    }
    return {name: milliseconds(capture(w, device), device, repeats) for name, w in works.items()}
