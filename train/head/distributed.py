"""The process group: one process without a launcher, several under `torchrun` or `deepspeed`."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from eagle.errors import EagleError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, fp64."""
        return self._reduce(tensor.to(torch.float64), dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        return self._reduce(tensor, dist.ReduceOp.MAX).tolist()

    def _reduce(self, tensor: torch.Tensor, op) -> torch.Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.cpu()

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work()` is on rank 0 (it must be picklable), on every rank. It may take any time;
        its error ends the other ranks too."""
        if self.size == 1:
            return work()
        value = failed = None
        if self.first:
            try:
                value = work()
            except BaseException as error:
                failed = error
        box = [(value, failed and (str(failed) or type(failed).__name__))]
        try:
            dist.broadcast_object_list(box, src=0, group=_patient())
        except RuntimeError as error:
            if not self.first:
                raise EagleError("rank 0 is gone; see what it wrote last") from error
            if not failed:
                raise
        if failed:
            raise failed
        value, reason = box[0]
        if reason:
            raise EagleError(f"rank 0 failed: {reason}")
        return value

    def gather(self, value) -> list:
        """Every rank's picklable value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=_patient())
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(None)


@functools.cache
def _patient() -> dist.ProcessGroup:
    """Where ranks wait for work of any length: a collective of the main group would give up after
    minutes. It notices at once when a process is gone, as its connection closes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def join_world() -> World:
    """Initialise DeepSpeed's communication from the launcher's environment, or alone."""
    store = None
    if "RANK" not in os.environ:
        # the store looks for a port itself: one found free before may be taken by now
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(store.port))
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_deepspeed()
    if not cuda:  # its shared-memory op needs a compiler at first use; gloo does the same without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if store is not None:
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        # at the end of the process, not of a run: DeepSpeed cannot join a second time
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return World(dist.get_rank(), dist.get_world_size(), device)


def import_deepspeed():
    """DeepSpeed without its chatter."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    try:
        with silence():
            import deepspeed
    except ImportError as error:
        raise EagleError(f"training needs deepspeed: pip install deepspeed ({error})") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # its collectives have older names than torch's
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
    return deepspeed


@contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches the terminal, not even from compilers that DeepSpeed tries when imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fd, _ in kept:
            os.dup2(nowhere.fileno(), fd)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, copy in kept:
                os.dup2(copy, fd)
                os.close(copy)
