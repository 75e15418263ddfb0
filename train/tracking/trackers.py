"""Where a run's numbers go besides its own files: TensorBoard, Weights & Biases."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class TensorBoard:
    """Event files in OUTPUT/tensorboard; `tensorboard --logdir OUTPUT` shows them."""

    def __init__(self, output: Path, config: dict, step: int) -> None:
        from tensorboardX import SummaryWriter

        # purge_step hides what a killed run wrote after the step it is resumed at; files are named
        # by the second, and a suffix keeps two starts apart
        kept = {"purge_step": step + 1 if step else None, "filename_suffix": f".{step}"}
        self.writer = SummaryWriter(str(output / "tensorboard"), **kept)
        self.close = self.writer.close
        if not step:
            text = "\n".join(f"    {key}: {value}" for key, value in config.items())
            self.writer.add_text("config", text, 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in OUTPUT/wandb until `wandb sync`."""

    def __init__(self, output: Path, config: dict, step: int) -> None:
        import wandb

        file = output / "wandb_id.txt"
        known = file.read_text(encoding="utf-8").strip() if file.exists() else None
        about: dict[str, Any] = {"project": "eagle-heads", "name": output.name, "config": config}
        self.run = wandb.init(**about, dir=str(output), id=known, resume="allow")
        atomic_write_text(file, self.run.id + "\n")
        # a resumed run repeats steps, which wandb's own counter would refuse
        self.run.define_metric("*", step_metric="step")
        self.close = self.run.finish

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def open_trackers(report_to: list[str] | None, output: Path, config: dict, step: int) -> dict:
    """The trackers by name, continuing after `step`. None: TensorBoard where it is installed."""
    require_installed(report_to)
    if report_to is None:
        report_to = ["tensorboard"] if find_spec("tensorboardX") else []
    opened = {}
    for name in report_to:
        try:
            opened[name] = TRACKERS[name](output, flat_config(config), step)
        except Exception as error:  # their own error classes, networks, disks
            remedy = "run `wandb login` or set WANDB_MODE=offline, or " if name == "wandb" else ""
            text = f"{name} does not start: {reason(error)}; {remedy}take it out of train.report_to"
            raise EagleError(text) from error
    return opened


def require_installed(report_to: list[str] | None) -> None:
    """Before a run loads anything: EagleError for a tracker whose package is not there."""
    for name in report_to or []:
        if not find_spec(package := PACKAGES[name]):
            text = f"train.report_to names {name}, which is not installed: pip install {package}"
            raise EagleError(f"{text}, or take it out")


def reason(error: Exception) -> str:
    """On one line, not too long."""
    return " ".join(str(error).split())[:200]


def scalars(values: dict, prefix: str) -> dict[str, float]:
    """Nested numbers -> flat names: `train/loss`, `train/acceptance_by_depth/1` (lists count from
    1). What is not a number is left out."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(n): item for n, item in enumerate(value, 1)}
        if isinstance(value, dict):
            flat |= scalars(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and key != "step":
            flat[f"{prefix}/{key}"] = float(value)
    return flat


def flat_config(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flat_config(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
