"""Stage `engine`: what passes and cycles cost on a model of real geometry, with forced acceptance.

Random weights, keys and values: times do not depend on them, and a random head is never right, so
cycles keep a fixed number of draft tokens. `eager` is the engine as it is; `graphed` are the same
passes at fixed shapes in a CUDA graph (static_cycle.py); off a GPU there are no graphs and both run
eagerly.

b rows, N nodes.
"""

from __future__ import annotations

import copy
import functools
import gc
import time

import torch

from eagle.costs import measure, read
from eagle.decode import Batch, decode
from eagle.draft import HeadDrafter
from eagle.plan import WIDEST, Experience, Plan
from eagle.request import Request, Row, Stopping
from eagle.static_cycle import StaticCycle, StaticPlain
from eagle.target import Target
from eagle.tree import DraftTree, TreeShape, ancestors
from eagle.verify import force
from kernels.choose import choose

from .clock import Stopwatch, busy_ms, capture, synchronisations
from .models import random_drafter, random_target, read_bytes
from .record import Goal, Record, found
from .sizes import Size, require_memory

AUTO_ACCEPT = 3  # draft tokens kept a cycle where tree="auto" chooses


class Bench:
    """A target, a head and a stopwatch; each method is one case."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device, self.watch = size, device, Stopwatch(device, size)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.target = random_target(size.model, dtype, device)
        self.drafter = random_drafter(self.target, size.draft_vocab, size.trees[0])
        self.target.set_feature_layers(self.drafter.head.config.feature_layers)
        self.copy = self.watch.copy_bandwidth(size.copy_bytes)  # bytes a second
        target, head = self.target, self.drafter.head
        kv = 2 * len(target.layers) * target.kv_heads * target.head_dim * target.dtype.itemsize
        self.facts = {
            "dtype": str(dtype).removeprefix("torch."),
            "layers": len(target.layers),
            "copy_bytes_per_second": self.copy,
            "target_bytes": read_bytes(target.model, target.embed),
            "head_bytes": read_bytes(head, None),
            "kv_bytes_per_token": kv,
        }

    def drafted(self, tree: str) -> HeadDrafter:
        self.drafter.reshape(TreeShape.parse(tree))
        return self.drafter

    def fits(self, rows: int, capacity: int) -> None:
        target = self.target
        width = 2 * target.kv_heads * target.head_dim * target.dtype.itemsize
        require_memory(
            self.device, rows * (capacity + 700) * width * (len(target.layers) + 1) + 2**31
        )

    def plain(self, rows: int, context: int, capacity: int) -> dict:
        """A plain step: the engine's, and graphed."""
        self.fits(rows, capacity)
        own = functools.partial(
            cycle, engine_batch(self.target, None, rows, context, capacity, None)
        )
        eager = self.watch.wall_ms(own)
        del own  # its cache, before the next is made
        return {"eager_ms": eager, "graphed_ms": self.graphed_plain(rows, context, capacity)}

    def graphed_plain(self, rows: int, context: int, capacity: int) -> float:
        static = StaticPlain(self.target, rows, capacity)
        at = occupy([static.cache], context)
        step = capture(static.step, self.device)
        return self.watch.device_ms(step, lambda: static.cache.lengths.copy_(at))

    def verification(self, rows: int, context: int, capacity: int, nodes: int) -> dict:
        """One pass over trees of `nodes` nodes and its choices."""
        self.fits(rows, capacity)
        target, cache = self.target, self.target.new_cache(rows, capacity + nodes)
        tree = some_tree(rows, nodes, target.vocab_size, self.device)
        seeds = torch.zeros(rows, dtype=torch.int64, device=self.device)
        occupy([cache], context)

        @torch.inference_mode()
        def work():
            logits, _ = target.verify_tree(tree.tokens, tree.depth, tree.mask, cache, features=True)
            return choose(logits, seeds, cache.lengths[:, None] + tree.depth + 1)

        cache.host_lengths = [context] * rows  # as the engine has it
        eager = self.watch.wall_ms(work)
        cache.host_lengths = None
        return {"eager_ms": eager, "graphed_ms": self.watch.device_ms(capture(work, self.device))}

    def draft(self, rows: int, context: int, tree: str) -> dict:
        """The head's passes of a cycle but the one that ingests: `depth` of them, and what is
        around.
        """
        static = StaticCycle(self.target, self.drafted(tree), rows, context + 64, 1)
        occupy(static.caches, context)
        state(static)

        @torch.inference_mode()
        def work():
            static.drafter.expand(static.root)

        graphed = self.watch.device_ms(capture(work, self.device))
        depth = static.drafter.shape.depth
        return {"graphed_ms": graphed, "per_pass_ms": graphed / max(depth, 1)}

    def full_cycle(self, rows: int, context: int, capacity: int, tree: str) -> dict:
        """A cycle that keeps the longest path of its tree: graphed, and the engine's own."""
        step, back = self.static(rows, context, capacity, tree)
        result = {"graphed_ms": self.watch.device_ms(step, back)}
        del step, back
        result["eager_ms"] = self.watch.wall_ms(self.own(rows, context, capacity, tree))
        facts, depth = self.facts, TreeShape.parse(tree).depth
        # `floor`: every weight once. `floor_by_pass`: the head's again in each of its passes
        live = rows * context * facts["kv_bytes_per_token"]
        once = 1e3 * (facts["target_bytes"] + facts["head_bytes"] + live) / self.copy
        each = once + 1e3 * depth * facts["head_bytes"] / self.copy
        return result | {
            "floor_ms": once,
            "floor_by_pass_ms": each,
            "graphed_vs_floor": result["graphed_ms"] / once,
            "graphed_vs_floor_by_pass": result["graphed_ms"] / each,
        }

    def host(self, rows: int, context: int, capacity: int, tree: str) -> dict:
        """What of a cycle is not kernels, and where the host waits. A caller who streams reads once
        a cycle, so the graphed cycle is timed with that read."""
        result: dict = {}
        step, back = self.static(rows, context, capacity, tree, read=True)
        result["graphed_ms"] = self.watch.wall_ms(step, back)
        back()
        result["graphed_busy_ms"] = busy_ms(step, self.device, runs=1)
        del step, back
        own = self.own(rows, context, capacity, tree)
        result["eager_ms"] = self.watch.wall_ms(own)
        waits = synchronisations(own, self.device)
        result["eager_synchronisations"] = None if waits is None else len(waits)
        result["eager_synchronised_at"] = waits
        result["eager_busy_ms"] = busy_ms(own, self.device)
        for kind in ("eager", "graphed"):
            busy = result[f"{kind}_busy_ms"]
            # profiled and timed apart, so that the profiler's own cost does not count
            share = None if busy is None else max(0.0, 1 - busy / result[f"{kind}_ms"])
            result[f"{kind}_outside_kernels"] = share
        return result

    def static(self, rows: int, context: int, capacity: int, tree: str, read: bool = False):
        """The graphed cycle, and what puts its lengths back."""
        self.fits(rows, capacity)
        drafter = self.drafted(tree)
        static = StaticCycle(self.target, drafter, rows, capacity, drafter.shape.levels)
        at = occupy(static.caches, context)
        state(static)

        def back() -> None:
            for cache in static.caches:
                cache.lengths.copy_(at)

        step = capture(static.step, self.device)
        back()
        return (functools.partial(read_back, step, static) if read else step), back

    def own(self, rows: int, context: int, capacity: int, tree: str):
        """The engine's own cycle, of as many draft tokens."""
        self.fits(rows, capacity)
        drafter = copy.copy(self.drafted(tree))
        judge = functools.partial(force, drafter.shape.levels)
        return functools.partial(
            cycle, engine_batch(self.target, drafter, rows, context, capacity, judge)
        )

    def automatic(self, rows: int, context: int) -> dict:
        """tree="auto" where each cycle keeps up to AUTO_ACCEPT draft tokens: tokens/s against plain
        decoding.
        """
        self.fits(rows, context + 256)
        new = 48 if self.watch.cuda else 6
        self.drafter.reshape(WIDEST)
        costs = read(measure(self.target, self.drafter, rows, context))
        learnt = Experience()
        rates = {
            "plain": [self.rate(rows, context, new, None, None) for _ in range(2)],
            # the first calls find out what pays
            "auto": [
                self.rate(rows, context, new, self.drafter, Plan(lambda _: costs, learnt))
                for _ in range(4)
            ],
        }
        plain, auto = rates["plain"][-1], rates["auto"][-1]
        graphed = 1e3 * rows / self.graphed_plain(rows, context, context + 256)
        return {
            "plain_tokens_per_second": plain,
            "auto_tokens_per_second": auto,
            "graphed_plain_tokens_per_second": graphed,
            "vs_plain": auto / plain,
            "vs_graphed_plain": auto / graphed,
            "kept": AUTO_ACCEPT,
        }

    def rate(self, rows: int, context: int, new: int, drafter, plan: Plan | None) -> float:
        """Tokens/s of the engine over `rows` rows after the prompts' pass."""
        some = [
            Row(Request([1 + i % 7] * context, stopping=Stopping(new)), new) for i in range(rows)
        ]
        steps = decode(
            self.target,
            some,
            drafter=copy.copy(drafter),
            plan=plan,
            verify=functools.partial(force, AUTO_ACCEPT),
        )
        next(steps)
        self.watch.wait()
        started = time.perf_counter()
        for _ in steps:
            pass
        self.watch.wait()
        return rows * (new - 1) / (time.perf_counter() - started)

    def compiled(self, context: int, capacity: int) -> dict:
        """The graphed plain step with each layer's norms and MLP compiled: the same attention,
        fewer kernels.
        """
        parts = [m for m in self.target.backbone.modules() if fusible(m)]
        for part in parts:
            part.compile(dynamic=False)
        try:
            graphed = self.graphed_plain(1, context, capacity)
        finally:
            for part in parts:
                part._compiled_call_impl = None
        return {"compiled_modules": len(parts), "graphed_ms": graphed}


def fusible(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "MLP"))


@torch.inference_mode()
def engine_batch(
    target: Target, drafter: HeadDrafter | None, rows: int, context: int, capacity: int, judge
) -> Batch:
    """The engine's rows in the middle of a generation, caches full of random numbers."""
    some = [Row(Request([1 + i % 7, 2], stopping=Stopping(10**9)), 10**9) for i in range(rows)]
    made = Batch(target, drafter, rows, capacity, judge or functools.partial(force, 0), None)
    made.admit(some)
    caches = [made.cache] + ([made.drafter.cache] if drafter else [])
    for cache in caches:
        cache.buffer.normal_()
        cache.lengths = torch.full_like(cache.lengths, context)
        cache.host_lengths = [context] * rows
    return made


@torch.inference_mode()
def cycle(made: Batch) -> None:
    """A cycle of the engine that leaves the lengths where they were."""
    caches = [made.cache] + ([made.drafter.cache] if made.drafter else [])
    before = [(c, c.lengths, c.host_lengths) for c in caches]
    made.settle()
    made.judge(made.expand())
    for cache, lengths, host in before:
        cache.lengths, cache.host_lengths = lengths, host


@torch.inference_mode()
def occupy(caches: list, context: int) -> torch.Tensor:
    """Random keys and values, `context` of them live in every row; returns these lengths."""
    for cache in caches:
        cache.buffer.normal_()
        cache.host_lengths = None
        cache.lengths.fill_(context)
    return caches[0].lengths.clone()


@torch.inference_mode()
def state(static: StaticCycle) -> None:
    """Something for the head to go on from."""
    drafter = static.drafter
    drafter.last.normal_()
    drafter.first.normal_()
    drafter.first.copy_(drafter.first.log_softmax(-1))


def read_back(step, static: StaticCycle) -> None:
    """A cycle and the one read that a caller who streams its tokens needs."""
    step()
    torch.cat([static.num_accepted[:, None], static.tokens], dim=1).tolist()


def some_tree(rows: int, nodes: int, vocab: int, device) -> DraftTree:
    """Each node's parent is about half as far from the root: depth log2(nodes)."""
    parents = ((torch.arange(nodes, device=device) - 1).clamp(min=0) // 2).expand(rows, nodes)
    mask = ancestors(parents.contiguous(), max(nodes.bit_length(), 1))
    tokens = torch.arange(nodes, device=device).expand(rows, nodes) * 7 % vocab
    depth = mask.sum(-1) - 1
    return DraftTree(tokens.contiguous(), parents.contiguous(), depth, mask, -depth.float())


def run(record: Record, size: Size, device: torch.device) -> list[Goal]:
    made: dict[str, Bench] = {}

    def start() -> dict:
        made["bench"] = Bench(size, device)
        return made["bench"].facts

    record.run("model", {"geometry": size.model.name}, start)
    if "bench" not in made:
        return goals(record.data["cases"], size, device)
    bench = made["bench"]

    def case(kind: str, **settings) -> None:
        record.run(kind, settings, lambda: getattr(bench, kind)(**settings))
        if device.type == "cuda":
            gc.collect()  # graphs hold memory until they are gone
            torch.cuda.empty_cache()

    main, small, context = size.trees[0], size.capacities[0], size.context
    case("plain", rows=1, context=context, capacity=small)
    for rows in (1, min(8, size.engine_batches[-1])):
        for capacity in size.capacities:
            case("full_cycle", rows=rows, context=context, capacity=capacity, tree=main)
    for nodes in size.verify_nodes:
        case("verification", rows=1, context=context, capacity=small, nodes=nodes)
    for tree in size.trees:
        case("draft", rows=1, context=context, tree=tree)
    for tree in size.trees[1:]:
        case("full_cycle", rows=1, context=context, capacity=small, tree=tree)
    for rows in size.engine_batches:
        case("plain", rows=rows, context=size.batch_context, capacity=2 * size.batch_context)
    for rows in size.auto_batches:
        case("automatic", rows=rows, context=min(size.batch_context, 256))
    for context in size.contexts:
        case("plain", rows=1, context=context, capacity=context + 128)
        case("full_cycle", rows=1, context=context, capacity=context + 128, tree=main)

    def sweep(tree: str) -> None:
        for rows in size.engine_batches:
            capacity = 2 * size.batch_context
            case("full_cycle", rows=rows, context=size.batch_context, capacity=capacity, tree=tree)

    sweep(main)
    if device.type == "cuda":  # elsewhere minutes of a C++ compiler for nothing
        case("compiled", context=size.context, capacity=small)
    case("host", rows=1, context=size.context, capacity=small, tree=main)
    for tree in size.trees[:0:-1]:  # many cases, and the least of them matter: last
        sweep(tree)
    return goals(record.data["cases"], size, device)


def goals(cases: list[dict], size: Size, device: torch.device) -> list[Goal]:
    context, main, small = size.context, size.trees[0], size.capacities[0]
    here = {"rows": 1, "context": context, "capacity": small}

    def one(kind: str, value: str, **settings) -> float | None:
        return next(iter(found(cases, kind, value, **settings)), None)

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    plain = one("plain", "graphed_ms", **here)
    nodes = max(size.verify_nodes)
    verification = one("verification", "graphed_ms", **here, nodes=nodes)
    judge = functools.partial(Goal.judge, device=device)
    made = [
        judge(
            f"verification of {nodes} nodes / graphed plain step",
            ratio(verification, plain),
            most=1.1,
        ),
        judge(
            "host waits a cycle, the engine",
            one("host", "eager_synchronisations", **here, tree=main),
            most=1,
        ),
        judge(
            f"full cycle {main} / its bandwidth floor, graphed",
            one("full_cycle", "graphed_vs_floor", **here, tree=main),
            most=1.6,
        ),
    ]
    for kind, who in (("eager", "the engine"), ("graphed", "graphed")):
        cycles = found(cases, "full_cycle", f"{kind}_ms", **here)
        best = ratio(plain, min(cycles, default=None))
        share = one("host", f"{kind}_outside_kernels", **here, tree=main)
        same = [
            ratio(
                one("full_cycle", f"{kind}_ms", rows=1, context=context, capacity=c, tree=main),
                one("full_cycle", f"{kind}_ms", **here, tree=main),
            )
            for c in size.capacities[1:]
        ]
        off = max((abs(r - 1) for r in same if r is not None), default=None)
        made += [
            judge(f"share of a cycle outside kernels, {who}", share, most=0.05),
            judge(f"efficiency at batch 1, best tree, {who}", best, least=0.7),
            judge(
                f"cycle at the largest capacity / at the smallest, off 1 by, {who}", off, most=0.02
            ),
        ]
    auto = one("automatic", "vs_graphed_plain", rows=32)
    made.append(judge('speedup at batch 32, tree="auto", over graphed plain', auto, least=1.0))
    return made
