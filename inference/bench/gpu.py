"""What a GPU alone can tell: the kernels beside masked SDPA, and steps and cycles of a model of
real geometry; docs/gpu.md has the fields and the goals.

Every contender runs as a CUDA graph, so that launches do not count. Times do not depend on the
weights, and as a random head is never right, cycles keep the longest path of their tree. At toy
size everything runs on a CPU, eagerly, which proves that it runs and measures nothing.

B rows, N nodes, D head_dim. shape: the keywords of a transformers config.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from eagle.draft import HeadDrafter
from eagle.errors import EagleError
from eagle.heads.head import Eagle3Head, HeadConfig
from eagle.model import EaModel
from eagle.static_cycle import StaticCycle
from eagle.target import Target
from eagle.tree import TreeShape
from inference.bench import cycle, engines
from inference.bench.cases import Sweep
from inference.bench.record import Record
from inference.bench.report import Section, tabulate
from inference.bench.timing import capture, milliseconds
from kernels.tree_attention import attend, attention_bias, pack_bits, tree_attention, unpack_bits

# Llama-3.1-8B, for transformers' LlamaConfig
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_8B |= {"vocab_size": 128256, "max_position_embeddings": 131072, "pad_token_id": 0}
LLAMA_8B |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """contexts: live tokens a row; capacity: tokens a slot holds; nodes: of a tree."""

    shape: dict
    draft_vocab: int = 32000
    repeats: int = 30
    copy_bytes: int = 2**32
    nodes: tuple[int, ...] = (1, 60)
    rows: tuple[int, ...] = (1, 8, 32, 64)
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    capacity: int = 65536
    trees: tuple[str, ...] = ("60,7,10", "30,5,6", "16,4,4", "8,4,2", "5,3,1")
    new_tokens: int = 64


TINY = dict(LLAMA_8B, hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=512)
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES = {
    "full": Size(LLAMA_8B),
    "toy": Size(TINY, 128, 1, 2**20, (1, 13), (1, 2), (40,), 256, ("8,3,2",), 12),
}


def gpu(
    *, stage: str = "all", size: str = "full", out: str = "runs/gpu", device: str | None = None
) -> None:
    """Measure kernels and engine on a GPU, a JSON file a stage in --out, whole after every case.

    --stage kernels, engine, or all. --size full, or toy, which also runs with --device cpu. A case
    that fails keeps its error. For correctness: pytest -m gpu; for the loss: the subject train.
    """
    asked = dict(locals())
    there = torch.cuda.is_available()
    place = torch.device(device or ("cuda" if there else "cpu"))
    if stage not in (*STAGES, "all") or size not in SIZES:
        raise EagleError(f"--stage is one of {', '.join(STAGES)}, all; --size full or toy")
    if place.type not in ("cuda", "cpu") or (place.type == "cuda" and not there):
        raise EagleError(f"no {place} here; use --device cpu --size toy, or check the driver")
    if place.type == "cpu" and size == "full":
        raise EagleError("full size needs a GPU; use --size toy on a CPU")
    summary = Record("gpu", gpu, asked)
    for name in STAGES if stage == "all" else [stage]:
        record = Record("gpu", gpu, {**asked, "stage": name})
        record.device, record.file = place, Path(out) / f"{name}.json"
        STAGES[name](record, SIZES[size])
        failed = sum("error" in run for run in record.runs)
        row = {"stage": name, "cases": len(record.runs), "failed": failed}
        summary.runs.append({**row, "seconds": round(record.spent, 1)})
    summary.device = place
    columns = {name: name for name in ("stage", "cases", "failed", "seconds")}
    parts = [Section("Stages", tabulate(summary.runs, **columns))]
    summary.hand_over(summary.result(), f"GPU suite, {size}", parts)


def kernels(record: Record, size: Size) -> None:
    """Attention with a cold L2, beside a large copy."""
    copy = copy_bandwidth(record, size)
    record.attempt("copy", {}, lambda: {"bytes_per_second": copy})
    for nodes, rows, context in itertools.product(size.nodes, size.rows, size.contexts):
        case = {"rows": rows, "context": context, "nodes": nodes}
        work = functools.partial(attention, record, size, copy, **case)
        record.attempt("tree_attention", case, work)


def copy_bandwidth(record: Record, size: Size) -> float:
    """Bytes a second of a large copy on the device, read and written ones counted."""
    source = torch.zeros(size.copy_bytes, dtype=torch.uint8, device=record.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), record.device, size.repeats)
    return 2e3 * size.copy_bytes / ms


def attention(record: Record, size: Size, copy: float, rows: int, context: int, nodes: int) -> dict:
    """Ours, told nothing of the mask in advance, and masked SDPA, which is given it. Bytes are the
    least that must move."""
    shape, device, B, N = size.shape, record.device, rows, nodes
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    D = shape["head_dim"]
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
    ms = {n: milliseconds(capture(w, device), device, size.repeats) for n, w in works.items()}
    rate = 1e3 * (k.numel() + v.numel() + 2 * q.numel()) * DTYPE.itemsize / ms["ours"]
    best = min(ms["sdpa_folded"], ms["sdpa_gqa"])
    ratios = {"of_copy_bandwidth": rate / copy, "vs_best_sdpa": ms["ours"] / best}
    return {"ms": ms, "bytes_per_second": rate, **ratios}


def engine(record: Record, size: Size) -> None:
    """Steps and cycles in CUDA graphs; and the engine as it is, by the bench's own measuring."""
    graphs, tree = Graphs(record, size), size.trees[0]
    record.attempt("model", {}, lambda: graphs.facts)

    def case(kind: str, **settings) -> None:
        record.attempt(kind, settings, lambda: getattr(graphs, kind)(**settings))

    for context in size.contexts:
        case("plain", rows=1, context=context, capacity=context + 128)
        case("cycle", rows=1, context=context, capacity=context + 128, tree=tree)
    case("cycle", rows=1, context=size.contexts[0], capacity=size.capacity, tree=tree)
    model = EaModel(graphs.target, graphs.drafter.head, tree)
    prompts = [[1 + i % 7 for i in range(size.contexts[0])]] * 2
    record.attempt("host", {}, lambda: cycle.measure(model, prompts[:1], size.new_tokens))
    sweep = Sweep(["hf", "vanilla", "eagle"], (1, 2), size.trees, forced_acceptance=3)
    options = {"max_new_tokens": size.new_tokens, "top_p": 0.0, "top_k": 0, "seed": 0}
    record.attempt("engines", {}, lambda: engines.measure(model, prompts, sweep, options, 1))
    for rows in size.rows:
        case("plain", rows=rows, context=1024, capacity=1152)
        for tree in size.trees:
            case("cycle", rows=rows, context=1024, capacity=1152, tree=tree)


STAGES = {"kernels": kernels, "engine": engine}


class Graphs:
    """A random target and head; `plain` and `cycle` are cases of the suite, `facts` the constants
    of a floor."""

    def __init__(self, record: Record, size: Size) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.device, self.repeats = record.device, size.repeats
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with self.device:  # weights are made there: nothing is read or fetched
            model = AutoModelForCausalLM.from_config(LlamaConfig(**size.shape), dtype=dtype)
        # an identity given, so that none is computed from the weights
        identity = {"id": "random", "weights": "random"}
        self.target = target = Target(model, "random", identity=identity)
        config = HeadConfig.for_target(target.config, draft_vocab_size=size.draft_vocab)
        with self.device:
            head = Eagle3Head(config).to(dtype).eval().requires_grad_(False)
        step = target.vocab_size // size.draft_vocab
        head.set_draft_vocab(torch.arange(size.draft_vocab) * step)
        self.drafter = HeadDrafter(head, target.embed, TreeShape.parse(size.trees[0]))
        target.set_feature_layers(head.config.feature_layers)
        kv = 2 * target.kv_heads * target.head_dim * target.dtype.itemsize
        embedding = sum(p.nbytes for p in target.embed.parameters())
        self.facts = {
            "layers": len(target.layers),
            "copy_bytes_per_second": copy_bandwidth(record, size),
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

        @torch.inference_mode()
        def step() -> None:
            work()
            for cache in caches:
                cache.lengths.fill_(context)

        return milliseconds(capture(step, self.device), self.device, self.repeats)
