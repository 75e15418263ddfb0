"""The process group: one process without a launcher, several under `torchrun` or `deepspeed`."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from eagle.errors import EagleError

T = TypeVar("T")
BEAT, PATIENCE = (
    5.0,
    120.0,
)  # seconds between signs of life, and without one until a rank is given up
_meetings = itertools.count()  # of all ranks alike: they meet in the same order


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

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work()` is on rank 0 (it must be picklable), on every rank. The others wait at the
        store and not in a collective, so it may take any time while rank 0 gives signs of life; its
        error ends them too."""
        if self.size == 1:
            return work()
        store, key = _store(), f"eagle/{next(_meetings)}"
        if not self.first:
            _await(store, key, lambda: store.check([key]))
            done, value = pickle.loads(store.get(key))
            if not done:
                raise EagleError(f"rank 0 failed: {value}")
            return value
        try:
            with _signs_of_life(store, key):
                value = work()
        except BaseException as error:
            store.set(key, pickle.dumps((False, str(error) or type(error).__name__)))
            raise
        store.set(key, pickle.dumps((True, value)))
        return value

    def gather(self, value) -> list:
        """Every rank's picklable value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all ranks are here; at the store, as in `first_does`."""
        if self.size > 1:
            store, key = _store(), f"eagle/{next(_meetings)}"
            store.add(f"{key}/here", 1)
            _await(store, key, lambda: store.add(f"{key}/here", 0) == self.size)


def _store() -> torch.distributed.Store:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


@contextmanager
def _signs_of_life(store: torch.distributed.Store, key: str) -> Iterator[None]:
    """While the block runs, a count rises in the store."""
    done = threading.Event()

    def beat() -> None:
        store.add(f"{key}/alive", 1)
        while not done.wait(BEAT):
            store.add(f"{key}/alive", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _await(store: torch.distributed.Store, key: str, there: Callable[[], bool]) -> None:
    """Return when `there()`. An error when rank 0 has begun and gives no sign of life any more, or
    its store is gone.
    """
    seen, count, pause = time.monotonic(), 0, 0.005
    try:
        while not there():
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            alive = store.add(f"{key}/alive", 0)
            if alive != count or not alive:
                seen, count = time.monotonic(), alive
            elif time.monotonic() - seen > PATIENCE:
                raise EagleError(
                    f"rank 0 has given no sign of life for {PATIENCE:.0f} s; see what it wrote last"
                )
    except RuntimeError as error:  # torch's of the store
        raise EagleError("rank 0 is gone; see what it wrote last") from error


def join_world() -> World:
    """Initialise DeepSpeed's communication from the launcher's environment, or alone."""
    store = None
    if "RANK" not in os.environ:
        # the store looks for a port itself: one that was free before may be taken when it is asked
        # for
        store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(store.port))
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
        backend = "nccl" if cuda else "gloo"
        if store is not None:
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
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
    """Nothing reaches the terminal, not even from the compilers that DeepSpeed tries out when
    imported.
    """
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
