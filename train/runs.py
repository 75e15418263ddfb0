"""A training run on disk, whatever it trains: its folder, its checkpoints, its log and its end.

OUTPUT/config.yaml  metrics.jsonl  summary.json
OUTPUT/checkpoints/step-N, checkpoint-N   whole, or not there
OUTPUT/checkpoints/latest, best           names of checkpoints
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError

from configs.errors import ConfigError
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.files import remove, tidy
from eagle.fingerprint import is_earlier
from train.head.distributed import World

NAME = re.compile(r"(?:step|checkpoint)-(\d+)")
STATES = ("state.json", "trainer_state.json")
RESULTS = ("summary.json", "head", "adapter")
TRIM_EVERY = 10  # steps; at each, it would take a tenth of a small head's step


# the folder


@contextmanager
def claimed(world: World, output: str | None, name: str, resume: str | None) -> Iterator[Path]:
    """The run's folder, chosen by rank 0. If the block fails, a new folder that holds nothing is
    removed."""

    def claim() -> tuple[Path, bool]:
        path = choose_output(output, name, resume)
        fresh = not path.exists()
        require_writable(path)
        return path, fresh

    path, fresh = world.first_does(claim)
    try:
        yield path
    except (EagleError, ConfigError):
        if fresh and world.first and not any(path.glob("*.jsonl")):
            shutil.rmtree(path, ignore_errors=True)
        raise


def choose_output(output: str | None, name: str, resume: str | None) -> Path:
    """Without `output` it is runs/NAME, numbered when taken; resuming takes the last of them."""
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and not path.is_dir():
            raise EagleError(f"--output {path} is a file; name a folder")
        if resume is None and holds_run(path):
            raise EagleError(
                f"{path} already holds a run; continue it with --resume, or choose another --output"
            )
        return path
    if resume not in (None, "auto"):
        return run_of(Path(resume).expanduser())
    base = Path("runs") / name
    names = [base, *(base.with_name(f"{name}-{n}") for n in range(2, 1000))]
    taken = [path for path in names if holds_run(path)]
    if resume and taken:
        return taken[-1]
    return next(path for path in names if path not in taken)


def holds_run(path: Path) -> bool:
    return any((path / name).exists() for name in RESULTS) or bool(checkpoints(path))


def require_writable(path: Path) -> None:
    """Make the folder, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        text = f"cannot write to {path}: {error.strerror}; choose another --output"
        raise EagleError(text) from error


def write_config(output: Path, cfg) -> None:
    """The whole config, defaults included: `--config OUTPUT/config.yaml` repeats the run."""
    values = cfg.model_dump(mode="json")
    values["train"].pop("resume", None)
    atomic_write_text(output / "config.yaml", yaml.safe_dump(values, sort_keys=False))


def require_supervised(tokens: int, minimum: int) -> None:
    """Refuse data that cannot teach anything."""
    if tokens < minimum:
        raise EagleError(
            f"the training data supervises {tokens} tokens, fewer than data.min_supervised_tokens="
            f"{minimum}: add data, check what is masked with python -m train.inspect, or lower the "
            "limit"
        )


# checkpoints


def is_checkpoint(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None and any((path / s).exists() for s in STATES)


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1])


def run_of(path: Path) -> Path:
    """The run folder of a checkpoint folder; a run folder is its own."""
    return path.parent.parent if NAME.fullmatch(path.name) else path


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(filter(is_checkpoint, (output / "checkpoints").glob("*-*")), key=step_of)


def point(output: Path, name: str, checkpoint: str) -> None:
    """Let `latest` or `best` name a checkpoint that is there."""
    atomic_write_text(output / "checkpoints" / name, checkpoint + "\n")


def pointed(output: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names, if both are there."""
    pointer = output / "checkpoints" / name
    if not pointer.exists():
        return None
    path = pointer.with_name(pointer.read_text(encoding="utf-8").strip())
    return path if is_checkpoint(path) else None


def prune(output: Path, keep: int, *safe: Path | None) -> None:
    """Remove all but the newest `keep` checkpoints and those in `safe`."""
    finish(output)
    for path in checkpoints(output)[:-keep]:
        if path not in safe:
            remove(path)


def finish(output: Path) -> None:
    """What a kill interrupted: checkpoints that were being written or removed. For the writer."""
    for stale in (output / "checkpoints").glob(".*-*"):
        tidy(stale.with_name(stale.name[1:].split(".", 1)[0]))


def require_same_run(checkpoint: Path, before: dict, now: dict) -> None:
    """A resumed run must have the model and data it began with; learning settings may change."""
    for key, value in now.items():
        had = before.get(key)
        if key in ("target", "base") and is_earlier(had[0] if isinstance(had, list) else had):
            raise EagleError(
                f"{checkpoint} was written by an earlier version, whose {key} cannot be compared "
                "with this one; start a new run from what it learned (--init_head or --adapter)"
            )
        if had != value:
            raise EagleError(
                f"{checkpoint} belongs to a run with {key}={had!r}, this one has "
                f"{value!r}; resume with the settings of that run, or start a new one with another "
                "--output"
            )


@contextmanager
def full_disk_told(output: Path) -> Iterator[None]:
    """A disk that takes no more becomes one line with the remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        named = re.search(r"os error (\d+)", str(error))  # how safetensors passes one on
        number = int(named[1]) if named else getattr(error, "errno", None)
        if "PytorchStreamWriter" in str(error):  # torch.save gives no number
            number = errno.ENOSPC
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise EagleError(
            f"cannot write to {output}: {os.strerror(number)}; the checkpoints there are whole: "
            "free some space and continue with --resume"
        ) from error


# while it runs


class MetricsLog:
    """A row a line, each flushed. When resumed, rows after step `keep_to` are dropped."""

    def __init__(self, path: Path, keep_to: int) -> None:
        self.path = path
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in rows if _step_in(line) <= keep_to]
        atomic_write_text(path, "".join(line + "\n" for line in kept))

    def write(self, row: dict) -> None:
        line = {k: v if k == "loss" else rounded(v) for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step_in(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a kill


def rounded(value):
    """Six significant digits: enough to plot, short enough to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM is kept in `number` (0: none), to be looked at
    between steps; a second one ends the run at once."""

    CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {s: signal.signal(s, self._stop) for s in self.CAUGHT}
        return self

    def __exit__(self, *error) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _stop(self, number, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


def trim_heap(step: int, device: torch.device) -> None:
    """Every few steps on a CPU: what glibc keeps of freed tensors goes back to the system. Rows
    differ in length, so later tensors do not fit the holes, and a run would grow for hundreds of
    steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and device.type == "cpu" and step % TRIM_EVERY == 0:
        trim(0)
