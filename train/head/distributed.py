"""The process group: one process without a launcher, several under `torchrun` or `deepspeed`."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from eagle.errors import EagleError


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
        return self._reduce(tensor.to(torch.float64), torch.distributed.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        return self._reduce(tensor, torch.distributed.ReduceOp.MAX).tolist()

    def _reduce(self, tensor: torch.Tensor, op) -> torch.Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        torch.distributed.all_reduce(tensor, op=op)
        return tensor.cpu()

    def share(self, value):
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's picklable value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def join_world() -> World:
    """Initialise DeepSpeed's communication from the launcher's environment, or alone."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(_free_port())}  # fmt: skip
        os.environ.update(alone)
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed = import_deepspeed()
    if (
        not cuda
    ):  # its shared-memory op would be compiled at first use; gloo does the same without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
        atexit.register(_leave_world)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _leave_world() -> None:
    """At the end of the process, not of a run: DeepSpeed cannot join a second time."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def import_deepspeed():
    """DeepSpeed without its chatter."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
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
    """Nothing reaches the terminal, not even from the compilers that DeepSpeed tries out when imported."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
