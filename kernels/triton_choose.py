"""The one token that the target picks at each node: Triton.

    greedy    argmax(x)                                   the first of equals
    sampled   argmax over K of s + g,   s = x / temperature,   g = -log(-log(uniform))

K is what top-k, top-p and min-p keep. Each keeps the scores above some floor, and K is defined,
without sorting, by how much lies strictly above a score. The specification is
`kernels.choose.choose_reference`:

    s in K  <=>  #{s' > s} < top_k
            and  mass{s' > s} < top_p * mass{top-k set}
            and  s >= max + log(min_p)

The floors themselves are not searched for. `_scan` takes the argmax c of s + g over the whole
vocabulary, cut into chunks that run in parallel. If c is in K it is the answer, as K is a subset.
If not, all of K lies strictly above s_c, and `_settle` looks for the next argmax there. Each try is
a draw from the softmax of what is left, so it lands in K with at least K's share of the probability
and otherwise leaves, on average, half of what lies below K: most choices need one look, and any a
handful. (FlashInfer samples by the same idea with fresh random numbers; with Gumbel noise fixed
beforehand the answer is exactly the argmax over K.)

Only top-k and top-p together need the k-th largest score itself, for the mass of the top-k set:
`_kth` finds it by bisection whose ends are always scores of the row.

NaN logits count as -inf here, so that a poisoned row yields some token of the vocabulary and always
ends.

B rows, N nodes, V vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # of _scan
SETTLE_BLOCK = 4096


@triton.jit
def _mix32(x):
    """`kernels.choose.mix32` on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keys(seed, position):
    """The two words that a (seed, position) adds to its tokens' hash."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key = _mix32(_mix32(low ^ 0x9E3779B9) ^ high)
    key = _mix32(key ^ _mix32(position.to(tl.uint32) ^ 0x85EBCA6B))
    return key, _mix32(key ^ 0xC2B2AE35)


@triton.jit
def _gumbel(token, key, second):
    bits = _mix32(_mix32(token.to(tl.uint32) ^ key) ^ second)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _scores(logits, token, stop, temperature, SAMPLE: tl.constexpr):
    """float32 scores of tokens < stop; -inf beyond, and for NaN."""
    x = tl.load(logits + token, mask=token < stop, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    # rounded division, as PyTorch's between tensors
    return tl.div_rn(x, tl.zeros_like(x) + temperature) if SAMPLE else x


@triton.jit
def _first_best(value, token):
    """The largest value and the least token that has it."""
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, token, 2147483647), axis=0)


@triton.jit
def _scan(
    logits,
    seeds,
    positions,
    temperatures,
    part_value,
    part_token,
    part_top,
    logits_b,
    logits_n,
    positions_b,
    N,
    V,
    chunk,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * N, chunks). The first best of logits or of noisy scores in one chunk, and the top
    score."""
    node = tl.program_id(0)
    b, n = (node // N).to(tl.int64), (node % N).to(tl.int64)
    logits += b * logits_b + n * logits_n
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, V)
    temperature = 1.0
    noisy = False
    key, second = tl.zeros((), tl.uint32), tl.zeros((), tl.uint32)
    if SAMPLE:
        temperature = tl.load(temperatures + b)
        noisy = temperature != 0.0
        temperature = tl.where(noisy, temperature, 1.0)
        key, second = _keys(tl.load(seeds + b), tl.load(positions + b * positions_b + n))

    lane = tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = start + lane
    top = value
    for block in range(start, stop, BLOCK):
        here = block + lane
        score = _scores(logits, here, stop, temperature, SAMPLE)
        if SAMPLE:
            top = tl.maximum(top, score)
            if noisy:
                score += _gumbel(here, key, second)
        token = tl.where(score > value, here, token)
        value = tl.maximum(value, score)
    best, first = _first_best(value, token)
    at = node.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(part_value + at, best)
    tl.store(part_token + at, first)
    if SAMPLE:
        tl.store(part_top + at, tl.max(top, axis=0))


@triton.jit
def _kth(logits, V, temperature, k, top, BLOCK: tl.constexpr):
    """The k-th largest score, or any score that as many as k scores reach; -inf if k are not above
    it.

    low: at least k scores are >= low. high: a score, and the k-th largest is <= high. Every look
    moves one of them to a score of the row, so it ends."""
    lane = tl.arange(0, BLOCK)
    low, high, reach = tl.full((), float("-inf"), tl.float32), top, 1.0
    searching = top > float("-inf")
    while searching:
        # ever further down until k scores are passed; then halves
        middle = tl.where(low == float("-inf"), high - reach, low * 0.5 + high * 0.5)
        middle = tl.where((middle > low) & (middle < high), middle, high)
        count = tl.zeros((BLOCK,), tl.int32)
        above = tl.full((BLOCK,), float("inf"), tl.float32)
        below = tl.full((BLOCK,), float("-inf"), tl.float32)
        for block in range(0, V, BLOCK):
            score = _scores(logits, block + lane, V, temperature, True)
            reaches = (score >= middle) & (block + lane < V)
            count += reaches.to(tl.int32)
            above = tl.minimum(above, tl.where(reaches, score, float("inf")))
            below = tl.maximum(below, tl.where(reaches, float("-inf"), score))
        reached = tl.sum(count, axis=0)
        enough = reached >= k
        low = tl.where(enough, tl.min(above, axis=0), low)
        high = tl.where(enough, high, tl.max(below, axis=0))
        searching = (low < high) & (reached != k)
        reach *= 4.0
    return low


@triton.jit
def _settle(
    logits,
    seeds,
    positions,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    part_value,
    part_token,
    part_top,
    choices,
    logits_b,
    logits_n,
    positions_b,
    N,
    V,
    chunks,
    CUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * N). Joins the chunks' candidates and, with CUT, settles on the best one that K
    holds."""
    node = tl.program_id(0)
    part = tl.arange(0, CHUNKS)
    at = node.to(tl.int64) * chunks + part
    value = tl.load(part_value + at, mask=part < chunks, other=float("-inf"))
    token = tl.load(part_token + at, mask=part < chunks, other=2147483647)
    _, choice = _first_best(value, token)
    choice = tl.minimum(choice, V - 1)  # whatever the logits held, a token of the vocabulary
    if CUT:
        b, n = (node // N).to(tl.int64), (node % N).to(tl.int64)
        logits += b * logits_b + n * logits_n
        temperature = tl.load(temperatures + b)
        top = tl.max(tl.load(part_top + at, mask=part < chunks, other=float("-inf")), axis=0)
        k, p = tl.load(top_ks + b), tl.load(top_ps + b)
        some_k, some_p = (k > 0) & (k < V), (p > 0.0) & (p < 1.0)
        least = top + tl.load(log_min_ps + b)
        least = tl.where(least == least, least, float("-inf"))  # inf - inf
        kth = tl.full((), float("-inf"), tl.float32)
        if (temperature != 0.0) & some_k & some_p:
            kth = _kth(logits, V, temperature, k, top, BLOCK)
            least = tl.maximum(least, kth)
        key, second = _keys(tl.load(seeds + b), tl.load(positions + b * positions_b + n))
        lane = tl.arange(0, BLOCK)
        cuts = some_k | some_p | (least > float("-inf"))
        searching = (temperature != 0.0) & cuts
        while searching:
            score = tl.load(logits + choice).to(tl.float32)
            score = tl.div_rn(tl.where(score == score, score, float("-inf")), temperature)
            kept = score >= least
            if kept & (score < top) & (some_k | some_p):  # nothing is above the top
                count = tl.zeros((BLOCK,), tl.int32)
                before = tl.zeros((BLOCK,), tl.float32)
                whole = tl.zeros((BLOCK,), tl.float32)
                for block in range(0, V, BLOCK):
                    others = _scores(logits, block + lane, V, temperature, True)
                    more = others > score
                    weight = tl.exp(others - top)
                    count += more.to(tl.int32)
                    before += tl.where(more, weight, 0.0)
                    whole += tl.where(others >= kth, weight, 0.0)
                fits_k = (tl.sum(count, axis=0) < k) | (some_k == 0)
                fits_p = (tl.sum(before, axis=0) < p * tl.sum(whole, axis=0)) | (some_p == 0)
                kept = fits_k & fits_p
            searching = (kept == 0) & (score < top)
            if searching:
                best_value = tl.full((BLOCK,), float("-inf"), tl.float32)
                best_token = tl.zeros((BLOCK,), tl.int32) + choice
                for block in range(0, V, BLOCK):
                    here = block + lane
                    others = _scores(logits, here, V, temperature, True)
                    open_ = (others > score) & (others >= least)
                    if tl.max(open_.to(tl.int32), axis=0) > 0:  # noise only where it may matter
                        noisy = tl.where(open_, others + _gumbel(here, key, second), float("-inf"))
                        best_token = tl.where(noisy > best_value, here, best_token)
                        best_value = tl.maximum(best_value, noisy)
                _, choice = _first_best(best_value, best_token)
    tl.store(choices + node, choice.to(tl.int64))


def choose_triton(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """`kernels.choose.choose` without host synchronisation. logits fp16, bf16 or fp32, V < 2^31 -
    2^13."""
    B, N, V = logits.shape
    assert seeds.shape == (B,) and positions.shape == (B, N) and V >= 1
    assert seeds.dtype == positions.dtype == torch.int64 and seeds.is_contiguous()
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    positions = positions if positions.stride(1) == 1 else positions.contiguous()
    sample = isinstance(temperature, torch.Tensor) or temperature != 0.0
    cut = sample and (
        any(isinstance(value, torch.Tensor) for value in (top_k, top_p, min_p))
        or 0 < top_k < V
        or 0.0 < top_p < 1.0
        or min_p > 0.0
    )
    device = logits.device

    def rows(value: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(dtype).expand(B).contiguous()
        return torch.full((B,), value, dtype=dtype, device=device)

    # about a thousand programs, each with some blocks; the result does not depend on the chunks
    chunks = max(1, min(triton.cdiv(V, 4 * BLOCK), triton.cdiv(1024, B * N)))
    chunk = triton.cdiv(triton.cdiv(V, chunks), BLOCK) * BLOCK
    chunks = triton.cdiv(V, chunk)
    part_value = torch.empty((B * N, chunks), dtype=torch.float32, device=device)
    part_top = torch.empty_like(part_value) if sample else part_value
    part_token = torch.empty((B * N, chunks), dtype=torch.int32, device=device)
    choices = torch.empty((B, N), dtype=torch.int64, device=device)
    temperatures = rows(temperature) if sample else part_value
    given, strides = (
        (logits, seeds, positions, temperatures),
        (*logits.stride()[:2], positions.stride(0)),
    )
    parts = part_value, part_token, part_top
    scan = {"SAMPLE": sample, "BLOCK": BLOCK, "num_warps": 4}
    _scan[(B * N, chunks)](*given, *parts, *strides, N, V, chunk, **scan)
    limits = (part_value,) * 3  # not looked at
    if cut:
        limits = rows(top_k, torch.int64), rows(top_p), rows(min_p).log()
    _settle[(B * N,)](
        *(*given, *limits, *parts, choices, *strides, N, V, chunks),
        CUT=cut,
        CHUNKS=triton.next_power_of_2(chunks),
        BLOCK=SETTLE_BLOCK,
        num_warps=16 if cut else 1,
    )
    return choices
