"""What a GPU alone can tell: the kernels beside masked SDPA, and steps and cycles of a model of
real geometry in CUDA graphs; docs/gpu.md has the fields and the goals.

At toy size everything runs on a CPU, which proves that it runs and measures nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from eagle.errors import EagleError
from eagle.model import EaModel
from inference.bench import cycle, engines
from inference.bench.cases import Sweep
from inference.bench.gpu_kernels import attention, copy_bandwidth, small_kernels
from inference.bench.gpu_model import LLAMA_8B, Graphs
from inference.bench.record import Record, hand_over, record_of
from inference.bench.report import Section, tabulate


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
    summary = record_of("gpu", gpu, asked, place)
    for name in STAGES if stage == "all" else [stage]:
        record = record_of("gpu", gpu, {**asked, "stage": name}, place)
        record.file = Path(out) / f"{name}.json"
        STAGES[name](record, SIZES[size])
        failed = sum("error" in run for run in record.runs)
        row = {"stage": name, "cases": len(record.runs), "failed": failed}
        summary.runs.append({**row, "seconds": round(record.spent, 1)})
    columns = {name: name for name in ("stage", "cases", "failed", "seconds")}
    parts = [Section("Stages", tabulate(summary.runs, **columns))]
    hand_over(summary.result(), f"GPU suite, {size}", parts, {"json": f"{out}/summary.json"})


def kernels(record: Record, size: Size) -> None:
    """Each kernel in a CUDA graph with a cold L2. Bytes are the least that must move."""
    device, repeats = record.device, size.repeats
    bandwidth = functools.partial(copy_bandwidth, size.copy_bytes, device, repeats)
    copy = record.attempt("copy", {}, lambda: {"bytes_per_second": bandwidth()})
    for nodes in size.nodes:
        for rows in size.rows:
            for context in size.contexts:
                case = {"rows": rows, "context": context, "nodes": nodes}
                work = functools.partial(attention, size.shape, device, repeats, **case)
                row = record.attempt("tree_attention", case, work)
                if "bytes_per_second" in row and "bytes_per_second" in copy:
                    row["of_copy_bandwidth"] = row["bytes_per_second"] / copy["bytes_per_second"]
    for rows in size.rows:
        work = functools.partial(small_kernels, size.shape, rows, max(size.nodes), device, repeats)
        record.attempt("commit_and_choose", {"rows": rows}, work)


def engine(record: Record, size: Size) -> None:
    """Steps and cycles in CUDA graphs; and the engine as it is, by the bench's own measuring."""
    made: list[Graphs] = []

    def start() -> dict:
        options = record.device, size.repeats, size.copy_bytes
        made.append(Graphs(size.shape, size.draft_vocab, *options))
        return made[0].facts

    record.attempt("model", {}, start)
    if not made:
        return
    graphs, tree = made[0], size.trees[0]

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
    record.attempt("engines", {}, lambda: engines.measure(model, prompts, sweep, options, 1, True))
    for rows in size.rows:
        case("plain", rows=rows, context=1024, capacity=1152)
        for tree in size.trees:
            case("cycle", rows=rows, context=1024, capacity=1152, tree=tree)


STAGES = {"kernels": kernels, "engine": engine}
