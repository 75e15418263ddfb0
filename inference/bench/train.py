"""`python -m inference.bench.train`: what a step of head training costs, and what the fused draft
loss saves.

Two measurements. **loss**: the draft loss and its backward pass alone, in tiles against all logits
at once, at a vocabulary and a number of tokens of one's choice; time and peak memory. **step**:
whole training steps of the given config (batch, target, head, optimizer), every arm on the same
rows in turns. Arms:

    fused       as training runs it
    naive       the loss with all logits at once
    compile     train.compile=true
    recompute   train.checkpoint_activations=true
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from configs.cli import main
from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text
from kernels.draft_loss import Objective, draft_loss, draft_loss_reference

ARMS = ("fused", "naive", "compile", "recompute")
MIB = 2**20


def bench(
    *overrides: str,
    data_format: str = "fim",
    base: str | None = None,
    data: str | None = None,
    config: str | None = None,
    arms: str = "fused,naive",
    steps: int = 4,
    repeats: int = 3,
    loss_vocab: int = 32768,
    loss_tokens: int = 2048,
    loss_hidden: int = 256,
    json_path: str | None = None,
) -> int:
    """Measure head training on this machine; the last line is one JSON object.

    --arms some of fused, naive, compile, recompute. --steps of each arm in turn, --repeats times
    after a warm-up; figures are medians. --loss_vocab, --loss_tokens, --loss_hidden: sizes of the
    loss alone, 0 tokens leave it out. --json_path keeps the JSON. Overrides are those of
    train.main: train.batch_size=16
    """
    wanted = [name.strip() for name in arms.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ARMS]:
        raise ConfigError(
            f"--arms {arms}: unknown {', '.join(unknown)}; use some of {', '.join(ARMS)}"
        )
    for name, value in (
        ("steps", steps),
        ("repeats", repeats),
        ("loss_vocab", loss_vocab),
        ("loss_hidden", loss_hidden),
    ):
        if value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    if loss_tokens < 0:
        raise ConfigError(
            f"--loss_tokens={loss_tokens}: must be at least 1, or 0 to leave the loss out"
        )
    if json_path and not Path(json_path).resolve().parent.is_dir():
        raise ConfigError(f"--json_path={json_path}: no such folder; make it first")
    flags = {"data.format": data_format, "model.base": base, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from train.tracking.card import environment

    result: dict = {"environment": environment(device, 1)}
    if loss_tokens:
        result["loss"] = bench_loss(loss_vocab, loss_tokens, loss_hidden, repeats, device)
    if wanted:
        result["step"] = bench_steps(cfg, wanted, steps, repeats)
    text = json.dumps(result)
    if json_path:
        atomic_write_text(Path(json_path), json.dumps(result, indent=1) + "\n")
    print(text)
    return 0


# the loss alone


def bench_loss(vocab: int, tokens: int, hidden: int, repeats: int, device: torch.device) -> dict:
    """Soft cross-entropy of `tokens` positions over `vocab` draft tokens, forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator().manual_seed(0)
    states = torch.randn(1, tokens, hidden, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=g).mul_(hidden**-0.5).to(device).requires_grad_()
    taught = torch.randn(tokens, hidden, generator=g).to(device, dtype)
    rows = torch.randn(vocab, hidden, generator=g).mul_(hidden**-0.5).to(device, dtype)
    importance = torch.full((1, tokens), 1 / tokens, device=device)

    def teacher(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = taught[start:stop] @ rows.T
        return logits, logits.argmax(-1)

    def run(implementation: Callable) -> None:
        states.grad = weight.grad = None
        implementation(states, weight, teacher, importance, Objective()).total.backward()

    arms = {"fused": draft_loss, "naive": draft_loss_reference}
    peaks = {name: peak_bytes(lambda f=f: run(f), device) for name, f in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, implementation in arms.items():
            _wait(device)
            started = time.perf_counter()
            run(implementation)
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    found = {
        name: {"ms": 1e3 * statistics.median(seconds[name]), "peak_mib": peaks[name] / MIB}
        for name in arms
    }
    fused, naive = found["fused"], found["naive"]
    say(
        f"loss, {tokens} tokens x {vocab}: fused {fused['ms']:.0f} ms, {fused['peak_mib']:.0f} MiB; "
        f"naive {naive['ms']:.0f} ms, {naive['peak_mib']:.0f} MiB"
    )
    return {
        "vocab": vocab,
        "tokens": tokens,
        "hidden": hidden,
        "dtype": str(dtype).removeprefix("torch."),
        **found,
        "time_ratio": fused["ms"] / naive["ms"],
        "memory_ratio": fused["peak_mib"] / naive["peak_mib"],
    }


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that `run` held beyond what was there; on a CPU from the allocator's own
    record.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# whole steps


def bench_steps(cfg: HeadTrainConfig, arms: list[str], steps: int, repeats: int) -> dict:
    """Tokens per second (all real tokens of the rows) of each arm."""
    from train.head.distributed import join_world

    world = join_world()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in arms:
            trainers[name] = _trainer(cfg, name, Path(folder) / name, world)
            say(f"{name}: first step")
            trainers[name].train_step(cfg.train.lr)
        rows: dict[str, list[dict]] = {name: [] for name in arms}
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(repeats):
            for name, trainer in trainers.items():
                found = [trainer.train_step(cfg.train.lr) for _ in range(steps)]
                rows[name] += found
                seconds = sum(row["tokens"] / row["tokens_per_second"] for row in found)
                rates[name].append(sum(row["tokens"] for row in found) / seconds)
                say(
                    f"turn {turn + 1}/{repeats}, {name}: {rates[name][-1]:.0f} tokens/s, "
                    f"loss {found[-1]['loss']:.4f}"
                )
        for trainer in trainers.values():
            trainer.batches = None  # ends the loader's processes
    result = {
        name: {
            "tokens_per_second": statistics.median(rates[name]),
            "turns": rates[name],
            "seconds": _phases(rows[name]),
            "loss": [row["loss"] for row in rows[name]],
        }
        for name in arms
    }
    first = result[arms[0]]["tokens_per_second"]
    return {
        "batch_size": cfg.train.batch_size * cfg.train.grad_accum,
        "ttt_steps": cfg.train.ttt_steps,
        "max_length": cfg.data.max_length,
        "loss": cfg.loss.name,
        "dtype": trainers[arms[0]].cfg.train.dtype,
        "steps": steps,
        "repeats": repeats,
        "tokens": sum(row["tokens"] for row in rows[arms[0]]),
        "arms": result,
        "ratios": {name: first / result[name]["tokens_per_second"] for name in arms[1:]},
    }


def _trainer(cfg: HeadTrainConfig, arm: str, output: Path, world):
    """A trainer that neither evaluates nor keeps anything."""
    from train.head.loop import Trainer
    from train.head.ttt import UnrolledHead

    changes = {"resume": None, "report_to": [], "max_steps": 10**6, "perf_every": 0, "profile": 0}
    if arm == "compile":
        changes["compile"] = True
    if arm == "recompute":
        changes["checkpoint_activations"] = True
    cfg = cfg.model_copy(
        update={
            "train": cfg.train.model_copy(update=changes),
            "eval": cfg.eval.model_copy(update={"num_prompts": 0}),
        }
    )
    output.mkdir()
    trainer = Trainer(cfg, output, world, quiet=True)
    if arm == "naive":
        module: UnrolledHead = trainer.module
        module.projection.loss = draft_loss_reference
    return trainer


def _phases(rows: list[dict]) -> dict[str, float]:
    """Median seconds of each part of a step."""
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    return {
        name: statistics.median(row["seconds"].get(name, 0.0) for row in rows) for name in names
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(bench, name="python -m inference.bench.train")
