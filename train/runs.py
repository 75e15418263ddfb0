"""A training run on disk, whatever it trains: its folder, its checkpoints, its log and its end.

OUTPUT/config.yaml  metrics.jsonl  summary.json
OUTPUT/checkpoints/step-N, checkpoint-N   whole, or not there
OUTPUT/checkpoints/latest, best           names of checkpoints
OUTPUT/.lock                              who writes here, while it runs
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from safetensors import SafetensorError

from configs.errors import ConfigError
from eagle.checkpoint import atomic_write_text
from eagle.errors import EagleError
from eagle.files import remove, tidy
from eagle.fingerprint import is_earlier
from train.head.distributed import World

T = TypeVar("T")

logger = logging.getLogger("train")

LOCK = ".lock"
SAVING = ".saving"  # in `checkpoints`: what a trainer of transformers is writing
NAME = re.compile(r"(?:step|checkpoint)-(\d+)")
STATES = ("state.json", "trainer_state.json")
RESULTS = ("summary.json", "head", "adapter")
TRIM_EVERY = 10  # steps; at each, it would take a tenth of a small head's step


# the folder


class Busy(EagleError):
    """Another process writes there."""


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """No other process that asks for the file `lock` gets past here meanwhile. The system frees it
    when its holder ends, however it ends, and a file that is left over blocks nobody. `what` is
    what the message names. Raises Busy, and EagleError where nothing can be written."""
    file = None
    while file is None or not os.fstat(file.fileno()).st_nlink:  # its holder removed it just now
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "ab+", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            remedy = "wait for it, end it there (kill PID), or choose another --output"
            raise Busy(f"{what} is being written by {holder}: {remedy}") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                text = f"cannot write to {what}: {error.strerror}; choose another --output"
                raise EagleError(text) from error
            said = "the disk of %s has no locks (%s): let no second run write there"
            logger.warning(said, what, error.strerror)
            break
    with suppress(OSError):  # a full disk: it is held all the same
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n".encode())
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # no locks there
            fcntl.flock(file, fcntl.LOCK_UN)  # children may still have the file open
        file.close()


@contextmanager
def claimed(world: World, output: str | None, name: str, resume: str | None) -> Iterator[Path]:
    """The run's folder, chosen and locked by rank 0. If the block fails, a new folder that holds
    nothing is removed."""
    held = ExitStack()

    def claim() -> tuple[Path, bool]:
        busy: list[Path] = []
        while True:
            path = choose_output(output, name, resume, busy)
            fresh = not path.exists()
            try:
                held.enter_context(locked(path / LOCK, path))
            except Busy:
                if output is not None or resume is not None:
                    raise
                busy.append(path)
                continue
            if choose_output(output, name, resume, busy) == path:
                return path, fresh
            held.close()  # a run ended in it just now

    with held:
        path, fresh = world.first_does(claim)
        try:
            with full_disk_told(path):
                yield path
        except (EagleError, ConfigError):
            if fresh and world.first and not any(path.glob("*.jsonl")):
                shutil.rmtree(path, ignore_errors=True)
            raise


def choose_output(
    output: str | None, name: str, resume: str | None, busy: Sequence[Path] = ()
) -> Path:
    """Without `output` it is runs/NAME, numbered when taken or among `busy`; resuming takes the
    last of them."""
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
    taken = [path for path in names if path in busy or holds_run(path)]
    if resume and taken:
        return taken[-1]
    return next(path for path in names if path not in taken)


def holds_run(path: Path) -> bool:
    return any((path / name).exists() for name in RESULTS) or bool(checkpoints(path))


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
    shutil.rmtree(output / "checkpoints" / SAVING, ignore_errors=True)
    for stale in (output / "checkpoints").glob(".*-*"):
        tidy(stale.with_name(stale.name[1:].split(".", 1)[0]))


def find_checkpoint(
    output: Path, resume: str, load: Callable[[Path], T]
) -> tuple[Path, T] | tuple[None, None]:
    """Where to go on from, and what `load` makes of it (EagleError: it is damaged). `auto`: the
    newest readable checkpoint of the run, None when there is none; else of the folder named. In
    the run that goes on, what a kill left is removed, and a checkpoint that is damaged or later is
    set aside under another name. Another run is only read."""
    path = output if resume == "auto" else Path(resume).expanduser()
    run = run_of(path)
    own = run.resolve() == output.expanduser().resolve()
    if own:
        finish(run)
    if NAME.fullmatch(path.name) and resume != "auto":
        found = path, load(path)
    else:
        found = _newest_readable(run, own, load)
        if found[0] is None and resume != "auto":
            remedy = "give a run folder, or a checkpoint of it"
            raise EagleError(f"--resume {path}: no checkpoint there; {remedy}")
    for later in checkpoints(run) if own and found[0] else ():
        if step_of(later) > step_of(found[0]):
            _set_aside(later, "left", f"the run goes on from {found[0].name}")
    return found


def _newest_readable(run: Path, own: bool, load: Callable[[Path], T]):
    damaged: dict[Path, str] = {}
    for path in checkpoints(run)[::-1]:
        try:
            found = path, load(path)
        except EagleError as error:
            damaged[path] = str(error)
            continue
        for other, why in damaged.items():
            _set_aside(other, "damaged", why) if own else logger.warning("%s", why)
        return found
    if damaged:
        raise EagleError(
            f"no checkpoint of {run} can be read; start a new run with another --output"
        )
    return None, None


def _set_aside(path: Path, word: str, why: str) -> None:
    """Rename a checkpoint so that nothing takes it for one of the run's."""
    aside = path.with_name(f"{word}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    logger.warning("%s; %s is now %s", why, path.name, aside)


def unreadable(checkpoint: Path, why: object) -> EagleError:
    return EagleError(
        f"the checkpoint {checkpoint} cannot be read ({why}); resume from another one"
    )


def require_same_run(checkpoint: Path, before: dict, now: dict) -> None:
    """A resumed run must have the model and data it began with; learning settings may change."""
    for key, value in now.items():
        had = before.get(key)
        if key in ("target", "base") and is_earlier(had[0] if isinstance(had, list) else had):
            raise EagleError(
                f"{checkpoint} was written by an earlier version, whose {key} cannot be compared "
                "with this one; start a new run from what it learned (--init_head or --adapter)"
            )
        had = repr(had) if key in before else "(not written down by that version)"
        if had != repr(value):
            raise EagleError(
                f"{checkpoint} belongs to a run with {key}={had}, this one has {value!r}; resume "
                "with the settings of that run, or start a new one with another --output"
            )


def changes(before: dict, now: dict) -> list[str]:
    """The note about learning settings of a resumed run that are others now. Both: configs, by
    sections."""
    found = [
        f"{section}.{key} {had[key]} -> {value}"
        for section, had in before.items()
        for key, value in now.get(section, {}).items()
        if key in had and had[key] != value and key not in ("output", "resume")
    ]
    return [f"settings changed: {', '.join(found)}"] if found else []


@contextmanager
def full_disk_told(output: Path) -> Iterator[None]:
    """A disk that takes no more becomes one line with the remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        named = re.search(r"os error (\d+)", str(error))  # how safetensors passes one on
        number = int(named[1]) if named else getattr(error, "errno", None)
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch.save
            number = errno.ENOSPC
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = getattr(error, "filename", None) or output
        raise EagleError(
            f"cannot write to {where}: {os.strerror(number)}; the checkpoints of {output} are "
            "whole: free some space and continue with --resume"
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
