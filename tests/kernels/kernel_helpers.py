"""Problems for the kernels: odd sizes, ragged rows, NaN where nothing may be read."""

import torch

from kernels.draft_loss import Objective
from kernels.tree_attention import pack_bits

WAYS = {
    "plain": {},
    "window": dict(sliding_window=6),
    "window of one": dict(sliding_window=1),
    "wide window": dict(sliding_window=270),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "all": dict(sliding_window=40, softcap=2.0, sinks=True),
}
# a row each: temperature, top-k, top-p, min-p
PARAMETERS = dict(
    temperature=torch.tensor([0.0, 0.5, 1.0, 1.7, 0.0, 1.0]),
    top_k=torch.tensor([3, 0, 5, 60, 0, 1]),
    top_p=torch.tensor([0.5, 0.9, 0.0, 0.4, 1.0, 0.2]),
    min_p=torch.tensor([0.0, 0.1, 0.0, 0.0, 0.3, 0.0]),
)
LOSSES = ["soft_ce", "kl", "reverse_kl", "overlap", "total_variation"]
OBJECTIVES = [Objective(loss) for loss in LOSSES]
OBJECTIVES += [Objective(loss, gamma, 1.3, "overlap") for loss in LOSSES for gamma in (0.5, 2.0)]
OBJECTIVES += [Objective(loss, 2.0, 0.7, "target_prob") for loss in LOSSES]
OBJECTIVES += [Objective(loss, smoothing=0.1) for loss in ("soft_ce", "kl")]
OBJECTIVES += [Objective("kl", 1.0, smoothing=0.2), Objective("soft_ce", 0.0)]


def options_of(way, heads):
    options = {"scaling": 0.3, **WAYS[way]}
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 2, heads)
    return options


def attention_problem(
    lengths, N, M, D, Hkv=1, G=1, dtype=torch.float32, seed=0, spare=3, device="cpu"
):
    """Arguments of tree_attention over views of one buffer [L, 2, B, Hkv, C, D]."""
    g, B = torch.Generator(device).manual_seed(seed), len(lengths)
    q = torch.randn(B, N, Hkv * G, D, generator=g, device=device).to(dtype).transpose(1, 2)
    shape = (2, 2, B, Hkv, max(lengths) + M + spare, D)
    buffer = torch.full(shape, float("nan"), dtype=dtype, device=device)
    for b, length in enumerate(lengths):
        live = torch.randn(2, Hkv, length + M, D, generator=g, device=device)
        buffer[1, :, b, :, : length + M] = live.to(dtype)
    mask = torch.rand(B, N, M, generator=g, device=device) < 0.4
    mask[:, torch.arange(N), M - N + torch.arange(N)] = True  # a query sees itself
    lengths = torch.tensor(lengths, device=device)
    depth = torch.randint(0, 9, (B, M), generator=g, device=device)
    return q, buffer[1, 0], buffer[1, 1], lengths, pack_bits(mask), lengths[:, None] + depth


def row_alone(arguments, b, capacity):
    """The arguments of tree_attention of one row, in a cache of its own."""
    q, k, v, *rest = (x[b : b + 1] for x in arguments)
    return q, k[:, :, :capacity], v[:, :, :capacity], *rest


def commit_problem(rows, D, K, dtype=torch.float32, seed=0, rising=True, device="cpu"):
    """Arguments of commit_kv: some paths rise, others do not; their padding is never looked at."""
    g, nodes = torch.Generator(device).manual_seed(seed), K + 8
    buffer = torch.randn(3, 2, rows, 2, nodes + 9, D, generator=g, device=device).to(dtype)
    lengths = torch.randint(0, 10, (rows,), generator=g, device=device)
    counts = torch.randint(0, K + 1, (rows,), generator=g, device=device)
    lengths[0], counts[0] = 0, K
    steps = [torch.randperm(nodes - 1, generator=g, device=device)[:K] + 1 for _ in range(rows)]
    path = torch.stack(steps)
    path = path.sort().values if rising else path
    path[:, 0] = 0 if rising else path[:, 0]
    path[torch.arange(K, device=device)[None] >= counts[:, None]] = 0
    return buffer, lengths, path, counts
