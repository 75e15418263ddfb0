"""Stage `correctness`: each kernel against its plain-PyTorch reference in higher precision, at real
shapes; and speculative tokens against plain ones, in the engine and in a graph.

An error is the relative one, |out - exact| / |exact| over all elements (Frobenius).

B rows, N nodes, M = N tree slots, L layers, D head_dim, V vocabulary.
"""

from __future__ import annotations

import torch

from eagle.static_cycle import StaticCycle
from kernels.choose import choose, choose_reference, gumbel_noise, process_logits
from kernels.commit_kv import commit_kv, commit_kv_reference
from kernels.dispatch import use_triton
from kernels.draft_loss import Objective, tile_loss, tile_loss_reference
from kernels.tree_attention import pack_bits, tree_attention, tree_attention_reference

from .clock import capture
from .record import Goal, Record
from .sizes import Geometry, Size, dtypes, require_memory

# relative errors above these are bugs: a few times the rounding of one operand
WORST = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CUTS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "cut": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
}
LOSSES = ("soft_ce", "kl", "reverse_kl", "overlap", "total_variation")
ROWS_CHECKED = 6  # of a batch, where it has more


def run(record: Record, size: Size, device: torch.device) -> list[Goal]:
    for graphed in (False, True):
        where = {"tree": "16,4,4", "graphed": graphed, "new_tokens": size.lossless_tokens}
        record.run("lossless", where, lambda w=where: lossless(**w, device=device))
    for shape in size.geometries:
        for dtype in dtypes(device):
            for batch in size.check_batches:
                for context in size.check_contexts:
                    for nodes in size.nodes:
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
                            lambda s=shape, d=dtype, b=batch, c=context, n=nodes: attention(
                                s, d, b, c, n, device
                            ),
                        )
            for batch in size.check_batches:
                where = {"geometry": shape.name, "dtype": name(dtype), "batch": batch}
                context = max(size.check_contexts)
                record.run(
                    "commit_kv",
                    where,
                    lambda s=shape, d=dtype, b=batch, c=context: commit(s, d, b, c, device),
                )
    for dtype in dtypes(device):
        for vocab in size.vocabs:
            for cut in CUTS:
                for rows in (1, min(16, max(size.check_batches))):
                    where = {"vocab": vocab, "dtype": name(dtype), "cut": cut, "rows": rows}
                    record.run(
                        "choose",
                        where,
                        lambda d=dtype, v=vocab, c=cut, r=rows: choices(
                            d, v, c, r, max(size.nodes), device
                        ),
                    )
            for loss in LOSSES:
                where = {"vocab": vocab, "dtype": name(dtype), "loss": loss}
                record.run(
                    "draft_loss", where, lambda d=dtype, v=vocab, k=loss: tile(d, v, k, device)
                )
    return goals(record.data["cases"], device)


def goals(cases: list[dict], device: torch.device) -> list[Goal]:
    """All of them are right; one that failed with an error is not, and one that was left out tells
    nothing.
    """
    left_out = not cases or any("skipped" in case for case in cases)
    wrong = sum(not case.get("right", False) for case in cases if "skipped" not in case)
    value = None if left_out and not wrong else float(wrong)
    return [Goal.judge("correctness cases that are wrong or failed", value, device, most=0)]


def lossless(tree: str, graphed: bool, new_tokens: int, device: torch.device) -> dict:
    """The shipped model and head in fp32: speculative tokens are the plain ones, from the engine's
    cycle, or from the one of fixed shape in a graph."""
    from eagle.model import EaModel

    model = EaModel.from_pretrained(dtype=torch.float32, device=device, tree=tree, compile="off")
    prompts = [[5 + (7 * i + j * j) % 900 for j in range(9 + 20 * i)] for i in range(3)]
    options = {"max_new_tokens": new_tokens, "eos_token_id": -1}
    expected = [row.tokens for row in model.generate(prompts, draft=False, **options).rows]
    if not graphed:
        made = model.generate(prompts, **options)
        got, tau = [row.tokens for row in made.rows], made.tau
    else:
        static = StaticCycle(model.target, model.drafter, len(prompts), 200 + 2 * new_tokens, None)
        static.begin(prompts)
        step = capture(static.step, device)
        static.begin(prompts)  # the warm-up moved on
        got, cycles = [[token] for token in static.root.tolist()], 0
        while min(map(len, got)) < new_tokens:
            step()
            gained = zip(static.num_accepted.tolist(), static.tokens.tolist(), strict=True)
            for row, (count, tokens) in zip(got, gained, strict=True):
                row += tokens[: count + 1] if len(row) < new_tokens else []
            cycles += 1
        tau, got = new_tokens / cycles, [row[:new_tokens] for row in got]
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    return {"rows": len(prompts), "rows_equal": same, "tau": tau, "right": same == len(prompts)}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention_problem(
    shape: Geometry, dtype: torch.dtype, lengths: list[int], nodes: int, spare: int, device
) -> tuple:
    """Arguments of `tree_attention` with random trees; every slot past a row's tree is NaN."""
    B, N, D = len(lengths), nodes, shape.head_dim
    capacity = max(lengths) + N + spare
    need = 2 * B * shape.kv_heads * capacity * D * dtype.itemsize
    require_memory(device, 1.5 * need + 2**30)
    g = torch.Generator(device).manual_seed(0)
    q = torch.randn(B, N, shape.heads, D, generator=g, device=device, dtype=dtype).transpose(1, 2)
    kv = torch.empty(2, B, shape.kv_heads, capacity, D, device=device, dtype=dtype)
    for b, length in enumerate(lengths):
        kv[:, b, :, : length + N].normal_(generator=g)
        kv[:, b, :, length + N :] = float("nan")
    mask = torch.rand(B, N, N, generator=g, device=device) < 0.3
    mask |= torch.eye(N, dtype=torch.bool, device=device)
    depth = torch.randint(0, 9, (B, N), generator=g, device=device)
    at = torch.tensor(lengths, device=device)
    return q, kv[0], kv[1], at, pack_bits(mask), at[:, None] + depth


def attention(
    shape: Geometry, dtype: torch.dtype, batch: int, context: int, nodes: int, device
) -> dict:
    # ragged: one row is full, one empty, the others anything between, beside a split's border too
    g = torch.Generator().manual_seed(batch * context + nodes)
    lengths = [context, 0, min(256, context), min(255, context)][:batch]
    lengths += torch.randint(0, context + 1, (batch - len(lengths),), generator=g).tolist()
    arguments = attention_problem(shape, dtype, lengths, nodes, 64, device)
    options = {"scaling": shape.head_dim**-0.5}
    got = tree_attention(*arguments, **options)
    again = tree_attention(*arguments, **options)
    triton = use_triton(arguments[0])
    step = max(1, batch // ROWS_CHECKED)
    checked = list(range(0, batch, step))[:ROWS_CHECKED] if batch > ROWS_CHECKED else range(batch)
    off = total = 0.0
    alone_equal = True
    for b in checked:
        one = [x[b : b + 1] for x in arguments]
        wide = [x.double() if x.is_floating_point() else x for x in one]
        exact = tree_attention_reference(*wide, **options)
        off += (got[b : b + 1].double() - exact).square().sum().item()
        total += exact.square().sum().item()
        alone_equal &= torch.equal(tree_attention(*one, **options), got[b : b + 1])
    error = (off / max(total, 1e-30)) ** 0.5
    finite, same = bool(got.isfinite().all()), torch.equal(got, again)
    right = finite and error <= WORST[dtype] and (not triton or (same and alone_equal))
    return {
        "implementation": "triton" if triton else "reference",
        "relative_error": error,
        "bound": WORST[dtype],
        "finite": finite,
        "repeatable": same,
        "rows_checked": len(checked),
        "row_alone_equal": alone_equal,
        "right": right,
    }


def commit(shape: Geometry, dtype: torch.dtype, batch: int, context: int, device) -> dict:
    """Overlapping moves in a buffer of real shape, few layers of it: equal to the last bit."""
    context = min(context, 2048)
    L, K, capacity = 4, 9, context + 80
    values = L * 2 * batch * shape.kv_heads * capacity * shape.head_dim
    require_memory(device, 3 * values * dtype.itemsize)
    g = torch.Generator(device).manual_seed(1)
    size = (L, 2, batch, shape.kv_heads, capacity, shape.head_dim)
    buffer = torch.randn(size, generator=g, device=device, dtype=dtype)
    wrong = 0
    for attempt in range(4):
        lengths = torch.randint(0, context, (batch,), generator=g, device=device)
        counts = torch.randint(0, K + 1, (batch,), generator=g, device=device)
        path = torch.rand(batch, 60, generator=g, device=device).argsort(1)[:, :K]
        path = path.sort(1).values if attempt % 2 else path
        expected = buffer.clone()
        commit_kv_reference(expected, lengths, path, counts)
        commit_kv(buffer, lengths, path, counts)
        wrong += int((buffer != expected).sum())
    return {"wrong_values": wrong, "right": wrong == 0}


def choices(dtype: torch.dtype, vocab: int, cut: str, rows: int, nodes: int, device) -> dict:
    """Equal choices; where logarithms round differently, another choice must be as good."""
    require_memory(device, rows * nodes * vocab * 40.0)
    g = torch.Generator(device).manual_seed(vocab)
    logits = torch.randn(rows, nodes, vocab, generator=g, device=device) * 2.5
    logits = logits.to(dtype)
    seeds = torch.randint(0, 2**60, (rows,), generator=g, device=device)
    positions = torch.randint(0, 30000, (rows, nodes), generator=g, device=device)
    got = choose(logits, seeds, positions, **CUTS[cut])
    expected = choose_reference(logits, seeds, positions, **CUTS[cut])
    differ = (got != expected).nonzero().tolist()
    gap = 0.0
    for b, n in differ:
        at = slice(b, b + 1), slice(n, n + 1)
        scores = process_logits(logits[at], **CUTS[cut]) if CUTS[cut] else logits[at].float()
        if CUTS[cut]:
            scores = scores + gumbel_noise(seeds[at[0]], positions[at], vocab)
        gap = max(gap, abs(scores[0, 0, got[b, n]] - scores[0, 0, expected[b, n]]).item())
    right = not differ if not CUTS[cut] else gap < 1e-4 and len(differ) <= 1 + rows * nodes // 50
    return {
        "choices": rows * nodes,
        "differ": len(differ),
        "largest_gap": gap,
        "right": bool(right),
    }


def tile(dtype: torch.dtype, vocab: int, loss: str, device) -> dict:
    """Losses, overlaps and gradients of a tile of logits against fp32 inputs of the same values."""
    S, R = 2, 24
    g = torch.Generator(device).manual_seed(2)
    logits = (torch.randn(S, R, vocab, generator=g, device=device) * 3).to(dtype)
    teacher = (torch.randn(R, vocab, generator=g, device=device) * 3).to(dtype)
    importance = torch.rand(S, R, generator=g, device=device)
    objective = Objective(loss, gamma=2.0)
    exact = tile_loss_reference(logits.double(), teacher.double(), importance, objective, True)
    got = tile_loss(logits.clone(), teacher, importance, objective, True)
    errors = {}
    for key, place in (("loss_error", 0), ("overlap_error", 1), ("gradient_error", 3)):
        a, b = got[place].double(), exact[place].double()
        errors[key] = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    # of equal logits any may come first in a maximum over a dimension
    same_best = torch.equal(*(logits.gather(-1, best[2][..., None]) for best in (got, exact)))
    right = same_best and errors["gradient_error"] <= WORST[dtype]
    right = right and max(errors["loss_error"], errors["overlap_error"]) <= 1e-3
    return {**errors, "bound": WORST[dtype], "same_best": same_best, "right": right}
