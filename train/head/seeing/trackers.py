"""Where a run's numbers go besides its own files: TensorBoard, Weights & Biases, Trackio.

Knows names and scalars; knows nothing of what they mean. A tracker that fails costs the run nothing
  but
its curves there: it is dropped with a warning.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError

PROJECT = "eagle-heads"


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    report_to: list[str] | None, output: Path, config: dict, step: int
) -> dict[str, Tracker]:
    """The trackers by name, continuing after `step`. None: TensorBoard where it is installed."""
    require_installed(report_to)
    if report_to is None:
        report_to = ["tensorboard"] if tensorboard_installed() else []
    return {name: OPEN[name](output, config, step) for name in report_to}


def require_installed(report_to: list[str] | None) -> None:
    """Before a run loads anything: EagleError for a tracker whose package is not there."""
    for name in report_to or []:
        if name == "tensorboard" and not tensorboard_installed():
            raise missing(name, "tensorboardX")
        if name != "tensorboard" and not importlib.util.find_spec(name):
            raise missing(name, name)


def tensorboard_installed() -> bool:
    return any(importlib.util.find_spec(name) for name in ("tensorboardX", "tensorboard"))


def scalars(values: dict, prefix: str) -> dict[str, float]:
    """Nested numbers -> flat names: `train/loss`, `acceptance_by_depth/1`, `source/chat/loss`.

    Lists count from 1. What is not a number is left out.
    """
    flat = {}
    for key, value in values.items():
        if isinstance(value, bool) or value is None or key == "step":
            continue
        if isinstance(value, (int, float)):
            flat[f"{prefix}/{key}"] = float(value)
        elif isinstance(value, dict):
            flat |= scalars(value, f"{prefix}/{key}")
        elif isinstance(value, (list, tuple)):
            flat |= scalars({str(n): v for n, v in enumerate(value, 1)}, f"{prefix}/{key}")
    return flat


class TensorBoard:
    """Event files in OUTPUT/tensorboard; `tensorboard --logdir OUTPUT` shows them."""

    def __init__(self, output: Path, config: dict, step: int) -> None:
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter
        else:
            from torch.utils.tensorboard import SummaryWriter
        # purge_step hides what a killed run wrote after the step it is resumed at; files are named
        # by the second, and a suffix keeps two starts apart
        self.writer = SummaryWriter(
            str(output / "tensorboard"),
            purge_step=step + 1 if step else None,
            filename_suffix=f".{step}",
        )
        if not step:
            text = "\n".join(f"    {key}: {value}" for key, value in flat_config(config).items())
            self.writer.add_text("config", text, 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in OUTPUT/wandb until `wandb sync`."""

    def __init__(self, output: Path, config: dict, step: int) -> None:
        import wandb

        name_file = output / "wandb_id.txt"
        known = name_file.read_text(encoding="utf-8").strip() if name_file.exists() else None
        try:
            self.run = wandb.init(
                project=PROJECT,
                name=output.name,
                dir=str(output),
                config=flat_config(config),
                id=known,
                resume="allow",
            )
        except Exception as error:  # its own error classes differ between versions
            reason = " ".join(str(error).split())[:200]
            raise EagleError(
                f"wandb does not start: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or "
                "take it out of train.report_to"
            ) from error
        atomic_write_text(name_file, self.run.id + "\n")
        # a resumed run repeats steps, which wandb's own counter would refuse
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A local Trackio project; `trackio show` serves it."""

    def __init__(self, output: Path, config: dict, step: int) -> None:
        import trackio

        self.trackio = trackio
        try:
            self.trackio.init(
                project=PROJECT, name=output.name, config=flat_config(config), resume="allow"
            )
        except Exception as error:  # sqlite, network or configuration: its own and others'
            reason = " ".join(str(error).split())[:200]
            raise EagleError(
                f"trackio does not start: {reason}; take it out of train.report_to"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def close(self) -> None:
        self.trackio.finish()


OPEN: dict[str, Callable[[Path, dict, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def flat_config(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flat_config(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def missing(tracker: str, package: str) -> EagleError:
    return EagleError(
        f"train.report_to names {tracker}, which is not installed: pip install {package}, or take it "
        "out"
    )
