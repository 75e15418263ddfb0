"""`python -m train.main`: train a draft head for a frozen target model."""

from __future__ import annotations

import os

from configs.cli import main as run_command
from configs.load import load_config
from configs.schema import HeadTrainConfig


def train(
    *overrides: str,
    data_format: str | None = None,
    base: str | None = None,
    data: str | None = None,
    output: str | None = None,
    features: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    init_head: str | None = None,
    config: str | None = None,
    resume: bool | str | None = None,
    profile: bool | int | None = None,
    local_rank: int | None = None,
) -> int:
    """Train a draft head (EAGLE-3; model.method=eagle1: EAGLE-1); without arguments, on the
    embedded model and the shipped FIM data.

    --data_format fim|chat|instruction|mixed|plain|tokenized; --base and --data name the target
    model and the data file(s); --config takes a YAML file or a preset; --resume continues the run
    in --output (or a checkpoint folder). --adapter and --quantization none|nf4|int8|int8_cpu say
    how the target is served, --init_head a head to start from: the head of a base is adapted to a
    tuned target in a short run. --features DIR: what `python -m train.prepare features` wrote, so
    that no layer of the target runs in a training step (evaluations still run it). --profile [N]
    records N steps with torch.profiler. Any setting is an override: train.max_steps=20
    loss.name=focal loss.gamma=2. Several processes: torchrun --nproc_per_node 2 -m train.main ...,
    or deepspeed --module train.main ...
    """
    flags = {
        "data.format": data_format,
        "model.base": base,
        "data.path": data,
        "train.output": output,
        "data.features": features,
        "model.adapter": adapter,
        "model.quantization": quantization,
        "model.init_head": init_head,
        "train.resume": resume,
        "train.profile": profile,
    }
    cfg = load_config(HeadTrainConfig, config, overrides, flags)
    if local_rank is not None:  # the deepspeed launcher's way
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    return run(cfg)


def run(cfg: HeadTrainConfig, quiet: bool = False) -> int:
    """Train as `cfg` says; returns the exit code."""
    from transformers.utils.logging import disable_progress_bar

    from eagle.loading import find_folder
    from train.head.distributed import join_world
    from train.runs import claimed, write_config
    from train.tracking.trackers import require_installed

    find_folder(cfg.model.base, weights=False)  # before anything is written
    require_installed(cfg.train.report_to)
    disable_progress_bar()
    world = join_world()
    with claimed(world, cfg.train.output, f"head-{cfg.data.format}", cfg.train.resume) as output:
        from train.head.loop import Trainer

        trainer = Trainer(cfg, output, world, quiet)
        if world.first:
            write_config(output, trainer.cfg)
        return trainer.fit()


if __name__ == "__main__":
    run_command(train, name="python -m train.main")
