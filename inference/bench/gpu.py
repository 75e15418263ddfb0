"""Measurements prepared for a GPU, in stages that fit ten minutes each; docs/gpu.md has the fields.

At toy size everything runs on a CPU, which proves that it runs and measures nothing. What needs
more than torch, transformers and triton is recorded as an error where that is missing.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from eagle.errors import EagleError
from eagle.model import EaModel
from inference.bench import cycle, engines
from inference.bench.cases import Sweep
from inference.bench.gpu_kernels import attention, copy_bandwidth, small_kernels
from inference.bench.gpu_model import LLAMA_8B, Graphs, graphed_tokens
from inference.bench.loss import losses
from inference.bench.record import Record, hand_over, record_of
from inference.bench.report import Section, tabulate

ROOT = Path(__file__).parents[2]
TESTS = ("tests/kernels/test_gpu.py", "tests/eagle/test_options.py")


@dataclass(frozen=True)
class Size:
    """contexts: live tokens a row; capacity: tokens a slot holds; nodes: of a tree; loss:
    positions, hidden, vocabulary."""

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
    loss: tuple[int, int, int] = (2048, 4096, 128256)


TINY = dict(LLAMA_8B, hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=512)
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES = {
    "full": Size(LLAMA_8B),
    "toy": Size(TINY, 128, 1, 2**20, (1, 13), (1, 2), (40,), 128, ("8,3,2",), 12, (64, 32, 512)),
}


def gpu(
    *,
    stage: str = "all",
    size: str = "full",
    out: str = "runs/gpu",
    budget_s: float = 540.0,
    device: str | None = None,
) -> None:
    """Check and measure kernels, engine and training on a GPU, a JSON file a stage in --out.

    --stage correctness, kernels, engine, training, or all. --size full, or toy, which also runs
    with --device cpu. A case that fails keeps its error; past --budget_s seconds of a stage its
    other cases are skipped. docs/gpu.md has the goals.
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
        record.file, record.budget_s = Path(out) / f"{name}.json", budget_s
        STAGES[name](record, SIZES[size])
        row = {"stage": name, "cases": len(record.runs), "seconds": record.spent}
        for trouble in ("error", "skipped"):
            row[trouble] = sum(trouble in run for run in record.runs)
        row["wrong"] = sum(run.get("right") is False for run in record.runs)
        summary.runs.append(row)
    columns = {name: name for name in ("stage", "cases", "wrong", "error", "skipped")}
    lines = tabulate(summary.runs, **columns, seconds="seconds:.0f")
    files = {"json": f"{out}/summary.json"}
    hand_over(summary.result(), f"GPU suite, {size}", [Section("Stages", lines)], files)


def correctness(record: Record, size: Size) -> None:
    """The tests that need a GPU; and the shipped model in fp32: speculative tokens of the cycle
    that a CUDA graph holds are the plain ones of the engine."""
    record.attempt("pytest", {}, gpu_tests)
    record.attempt("lossless", {}, lambda: lossless(4 * size.new_tokens, record.device))


def gpu_tests() -> dict:
    """`pytest -m gpu`: how many passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise EagleError(f"pytest ended with {done.returncode}: {done.stderr[-300:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {f"{k}_of_tests": int(suite.get(k)) for k in ("failures", "errors", "skipped")}
    return {"tests": int(suite.get("tests")), **counts, "right": done.returncode in (0, 5)}


def lossless(new: int, device: torch.device) -> dict:
    model = EaModel.from_pretrained(dtype="float32", device=device, tree="16,4,4", compile="off")
    prompts = [[5 + (7 * i + j * j) % 900 for j in range(9 + 20 * i)] for i in range(3)]
    options = {"max_new_tokens": new, "eos_token_id": -1, "draft": False}
    expected = [row.tokens for row in model.generate(prompts, **options).rows]
    return {"right": graphed_tokens(model, prompts, new) == expected}


def kernels(record: Record, size: Size) -> None:
    """Each kernel in a CUDA graph with a cold L2. Bytes are the least that must move."""
    device, repeats = record.device, size.repeats
    bandwidth = functools.partial(copy_bandwidth, size.copy_bytes, device, repeats)
    copy = record.attempt("copy", {}, lambda: {"bytes_per_second": bandwidth()})
    for nodes in size.nodes:
        for rows in size.rows:
            for context in size.contexts:
                case = {"rows": rows, "context": context, "nodes": nodes}
                work = functools.partial(attention, size.shape, **case)
                row = record.attempt("tree_attention", case, lambda w=work: w(device, repeats))
                if "bytes_per_second" in row and "bytes_per_second" in copy:
                    row["of_copy_bandwidth"] = row["bytes_per_second"] / copy["bytes_per_second"]
    for rows in size.rows:
        work = functools.partial(small_kernels, size.shape, rows, max(size.nodes), device, repeats)
        record.attempt("commit_and_choose", {"rows": rows}, work)


def engine(record: Record, size: Size) -> None:
    """A model of real geometry: steps and cycles in CUDA graphs; and the engine as it is, by the
    bench's own measuring."""
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


def training(record: Record, size: Size) -> None:
    """The fused draft loss against the naive one; on a GPU whole steps too, of the embedded
    model's head."""
    record.attempt("draft_loss", {}, lambda: loss_ratios(size, record.device))
    if record.device.type == "cuda":
        record.attempt("steps", {"base": "embedded"}, head_steps)


def loss_ratios(size: Size, device: torch.device) -> dict:
    fused, naive = losses(3, *size.loss, 5, device)
    ratios = {f"{key}_ratio": fused[key] / naive[key] for key in ("ms", "peak_bytes")}
    return {"fused": fused, "naive": naive, **ratios}


def head_steps() -> dict:
    from configs.load import load_config
    from configs.schema import HeadTrainConfig
    from inference.bench.train import measure_steps

    cfg = load_config(HeadTrainConfig, None, [], {"data.format": "fim"})
    return {"arms": measure_steps(cfg, ["fused", "naive"], 4, 3, torch.device("cuda"))}


STAGES = {"correctness": correctness, "kernels": kernels, "engine": engine, "training": training}
