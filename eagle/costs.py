"""What a cycle costs on this machine: measured once for a model, a mode, a number of rows and a
context length, and kept on disk."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch

from .decode import Batch
from .draft import HeadDrafter
from .files import atomic_write_text
from .loading import target_fingerprint
from .plan import SHAPES, WIDEST, Costs, size_of
from .request import Request, Row, Stopping
from .target import Target
from .verify import verify

MOST = {"cpu": 256, "cuda": 2048}  # tokens a pass: larger ones lose where plain passes do not
REPEATS = 12


class CostTable:
    """costs(rows, context), measured when first asked for and kept in `folder`."""

    def __init__(self, target: Target, drafter: HeadDrafter, mode: str, folder: Path) -> None:
        self.target, self.drafter = target, drafter
        machine = device_name(target.device), torch.get_num_threads(), torch.__version__
        model = target_fingerprint(target.model), target.dtype, drafter.head.config
        facts = repr((machine, model, mode, SHAPES))
        self.path = folder / f"costs-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
        try:
            self.known = dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: measured anew
            self.known = {}

    def __call__(self, rows: int, context: int) -> Costs:
        """For `rows` rows of about `context` tokens: both are rounded up, see `size_of`."""
        rows = size_of(rows)
        context = min(1 << max(context - 1, 127).bit_length(), self.target.max_positions // 2)
        key = f"{rows}x{context}"
        if key not in self.known:
            self.known[key] = measure(self.target, self.drafter, rows, context)
            # a folder that cannot be written costs the next process a measurement
            with contextlib.suppress(OSError):
                atomic_write_text(self.path, json.dumps(self.known))
        return self.known[key]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {os.cpu_count()}"


@torch.inference_mode()
def measure(target: Target, drafter: HeadDrafter, rows: int, context: int) -> Costs:
    """Milliseconds of a whole cycle, plain and with each tree that is not too large. Never a pass
    alone: between two runs of a pass, others use the caches of the processor."""
    drafter = copy.copy(drafter)
    drafter.reshape(WIDEST)
    costs = {"plain": fastest(middle_of(target, None, rows, context))}
    speculative = middle_of(target, drafter, rows, context)
    for n, shape in enumerate(SHAPES):
        if n and rows * shape.num_nodes > MOST.get(target.device.type, 256):
            break
        speculative.drafter.reshape(shape)
        costs[str(shape)] = fastest(speculative)
    return costs


def middle_of(target: Target, drafter: HeadDrafter | None, rows: int, context: int) -> Batch:
    """Rows in the middle of a generation, whatever their slots hold."""
    some = [Row(Request([1 + i % 7, 2], stopping=Stopping(10**6)), 10**6) for i in range(rows)]
    made = Batch(target, drafter, rows, context + 64, verify, None)
    made.admit(some)
    for cache in made.caches():
        cache.buffer.zero_()  # what nobody wrote may be NaN, and the tree of such scores is none
        cache.lengths = torch.full_like(cache.lengths, context)
        cache.host_lengths = [context] * rows
    return made


def fastest(batch: Batch) -> float:
    """The least of some cycles at one context: what else runs on the machine only ever adds."""
    spent, device = [], batch.target.device
    for _ in range(1 + REPEATS):
        before = [(cache, cache.lengths, cache.host_lengths) for cache in batch.caches()]
        started = time.perf_counter()
        batch.settle()
        batch.judge(batch.expand())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(1e3 * (time.perf_counter() - started))
        for cache, lengths, host_lengths in before:
            cache.lengths, cache.host_lengths = lengths, host_lengths
    return min(spent[1:])
