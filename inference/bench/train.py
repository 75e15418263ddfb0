"""What a step of head training costs, and what the fused draft loss saves.

Two measurements. **loss**: the draft loss and its backward pass alone. **step**: whole training
steps of the given config (batch, target, head, optimizer), every arm on the same rows in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import HeadTrainConfig

# an arm changes these of `train.*`; naive takes the loss with all logits at once
ARMS = {
    "fused": {},
    "naive": {},
    "compile": {"compile": True},
    "recompute": {"checkpoint_activations": True},
}
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
    asked = dict(locals())
    wanted = [name.strip() for name in arms.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ARMS]:
        raise ConfigError(f"--arms: unknown {', '.join(unknown)}; use some of {', '.join(ARMS)}")
    if loss_tokens < 0:
        raise ConfigError(f"--loss_tokens={loss_tokens}: 0 leaves the loss out")
    import torch

    from inference.bench.loss import losses
    from inference.bench.record import hand_over, record_of, require
    from inference.bench.report import Section, tabulate

    require(asked, "steps", "repeats", "loss_vocab", "loss_hidden")
    flags = {"data.format": data_format, "model.base": base, "data.path": data}
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = record_of("train", train, asked, device)
    if loss_tokens:
        record.runs += losses(1, loss_tokens, loss_hidden, loss_vocab, repeats, device)
    if wanted:
        record.runs += measure_steps(cfg, wanted, steps, repeats, device)
    columns = {"kind": "kind", "arm": "which", "ms": "ms:.1f", "peak bytes": "peak_bytes"}
    columns |= {"tokens/s": "tokens_per_second:.0f", "slower than the first": "ratio:.2f"}
    sections = [Section("Training", tabulate(record.runs, **columns))]
    title = f"{cfg.train.batch_size * cfg.train.grad_accum} rows, {cfg.train.ttt_steps} steps of "
    hand_over(record.result(), f"{title}training-time test", sections, asked)


def measure_steps(
    cfg: HeadTrainConfig, arms: list[str], steps: int, repeats: int, device
) -> list[dict]:
    """A row an arm: tokens per second, median seconds of a step's parts, losses."""
    from inference.bench.timing import say, turns
    from train.head.distributed import join_world

    world = join_world()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(cfg, name, Path(folder) / name, world) for name in arms}
        for name, trainer in trainers.items():
            say(f"{name}: first step")
            trainer.train_step(cfg.train.lr)
        rows: dict[str, list[list[dict]]] = {name: [] for name in arms}
        for name in turns(arms, repeats):
            rows[name].append([trainers[name].train_step(cfg.train.lr) for _ in range(steps)])
        for trainer in trainers.values():
            trainer.batches = None  # ends the loader's processes
    found = [{"kind": "step", "which": name, **figures(rows[name])} for name in arms]
    for run in found:
        run["ratio"] = found[0]["tokens_per_second"] / run["tokens_per_second"]
    return found


def figures(repeats: list[list[dict]]) -> dict:
    """Of an arm's steps, repeat by repeat."""
    rates = []
    for rows in repeats:
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
        rates.append(sum(row["tokens"] for row in rows) / seconds)
    rows = [row for rows in repeats for row in rows]
    parts = dict.fromkeys(name for row in rows for name in row["seconds"])
    return {
        "tokens_per_second": statistics.median(rates),
        "turns": rates,
        "seconds": {p: statistics.median(r["seconds"].get(p, 0.0) for r in rows) for p in parts},
        "loss": [row["loss"] for row in rows],
    }


def trainer_of(cfg: HeadTrainConfig, arm: str, output: Path, world):
    """A trainer that neither evaluates nor keeps anything."""
    from kernels.draft_loss import draft_loss_reference
    from train.head.loop import Trainer

    changed = {
        "train": cfg.train.model_copy(update={**QUIET, **ARMS[arm]}),
        "eval": cfg.eval.model_copy(update={"num_prompts": 0}),
    }
    output.mkdir()
    trainer = Trainer(cfg.model_copy(update=changed), output, world, quiet=True)
    if arm == "naive":
        trainer.module.projection.loss = draft_loss_reference
    return trainer
