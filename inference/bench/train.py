"""What a step of head training costs, and what the fused draft loss saves.

**draft_loss**: the loss and its backward pass alone, in tiles against all logits at once.
**step**: whole training steps of the given config, every arm on the same rows in turns.

U positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import HeadTrainConfig
from inference.bench.record import Record
from inference.bench.report import Section, tabulate
from inference.bench.timing import peak_bytes, race, say, turns
from kernels.draft_loss import Objective, draft_loss, draft_loss_reference

# an arm changes these of `train.*`; naive takes the loss with all logits at once
ARMS = {"fused": {}, "naive": {}, "compile": {"compile": True}}
ARMS["recompute"] = {"checkpoint_activations": True}
# neither kept nor told
QUIET = {"resume": None, "report_to": [], "max_steps": 10**6, "perf_every": 0, "profile": 0}


def train(
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
    json: str | None = None,
    report: str | None = None,
) -> None:
    """Measure head training on this machine.

    --arms some of fused (as training runs it), naive (the loss with all logits at once), compile
    (train.compile=true), recompute (train.checkpoint_activations=true). --steps of each arm in
    turn, --repeats times after a warm-up; figures are medians. --loss_vocab, --loss_tokens,
    --loss_hidden: sizes of the loss alone, 0 tokens leave it out. Overrides are those of
    train.main: train.batch_size=16
    """
    record = Record("train", train, dict(locals()), "steps", "repeats", "loss_vocab", "loss_hidden")
    wanted = [name.strip() for name in arms.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ARMS]:
        raise ConfigError(f"--arms: unknown {', '.join(unknown)}; use some of {', '.join(ARMS)}")
    flags = {"data.format": data_format, "model.base": base, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    record.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if loss_tokens > 0:
        sizes = loss_tokens, loss_hidden, loss_vocab
        record.runs += measure_loss(*sizes, repeats, record.device)
    if wanted:
        record.runs += measure_steps(cfg, wanted, steps, repeats)
    columns = {"kind": "kind", "arm": "which", "ms": "ms:.1f", "peak bytes": "peak_bytes"}
    columns |= {"tokens/s": "tokens_per_second:.0f", "slower than the first": "ratio:.2f"}
    sections = [Section("Training", tabulate(record.runs, **columns))]
    title = f"{cfg.train.batch_size * cfg.train.grad_accum} rows, {cfg.train.ttt_steps} steps of "
    record.hand_over(record.result(), f"{title}training-time test", sections)


def measure_loss(U: int, H: int, V: int, repeats: int, device: torch.device) -> list[dict]:
    """Soft cross-entropy against a teacher, with gradients of the hidden states and of the
    projection. A row an implementation: milliseconds, peak bytes above what the inputs hold."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device)

    hidden = normal(1, U, H).to(dtype).requires_grad_()
    weight = normal(V, H).mul_(H**-0.5).requires_grad_()
    states, rows = normal(U, H).to(dtype), normal(V, H).mul_(H**-0.5).to(dtype)
    importance = torch.full((1, U), 1 / U, device=device)

    def teacher(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = states[start:stop] @ rows.T
        return logits, logits.argmax(-1)

    def run(loss: Callable) -> None:
        loss(hidden, weight, teacher, importance, Objective()).total.backward()
        hidden.grad = weight.grad = None

    losses = {"fused": draft_loss, "naive": draft_loss_reference}
    works = {name: functools.partial(run, loss) for name, loss in losses.items()}
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}
    found = []
    for which, spent in race(works, repeats, device)[0].items():
        row = {"kind": "draft_loss", "which": which, "positions": U, "hidden": H, "vocab": V}
        found.append({**row, "ms": 1e3 * statistics.median(spent), "peak_bytes": peaks[which]})
    return found


def measure_steps(cfg: HeadTrainConfig, arms: list[str], steps: int, repeats: int) -> list[dict]:
    """A row an arm: tokens per second, median seconds of a step's parts, losses."""
    from train.head.distributed import join_world

    world = join_world()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(cfg, name, Path(folder) / name, world) for name in arms}
        for name, trainer in trainers.items():
            say(f"{name}: first step")
            trainer.train_step(cfg.train.lr)
        rows: dict[str, list[dict]] = {name: [] for name in arms}
        for name in turns(arms, repeats):
            rows[name] += [trainers[name].train_step(cfg.train.lr) for _ in range(steps)]
        for trainer in trainers.values():
            trainer.batches = None  # ends the loader's processes
    found = []
    for name, made in rows.items():
        rates = [row["tokens_per_second"] for row in made]
        run = {"kind": "step", "which": name, "tokens_per_second": statistics.median(rates)}
        parts = dict.fromkeys(part for row in made for part in row["seconds"])
        for part in parts:
            parts[part] = statistics.median(row["seconds"].get(part, 0.0) for row in made)
        run |= {"rates": rates, "seconds": parts, "loss": [row["loss"] for row in made]}
        found.append(run)
        run["ratio"] = found[0]["tokens_per_second"] / run["tokens_per_second"]
    return found


def trainer_of(cfg: HeadTrainConfig, arm: str, output: Path, world):
    """A trainer that neither evaluates nor keeps anything."""
    from train.head.loop import Trainer

    changed = {"train": cfg.train.model_copy(update={**QUIET, **ARMS[arm]})}
    changed["eval"] = cfg.eval.model_copy(update={"num_prompts": 0})
    output.mkdir()
    trainer = Trainer(cfg.model_copy(update=changed), output, world, quiet=True)
    if arm == "naive":
        trainer.module.projection.loss = draft_loss_reference
    return trainer
