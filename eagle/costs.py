"""What a pass costs on this machine: measured once for a model, a mode, a number of rows and a
context length, and kept on disk.

b rows, N nodes a row, T = b * N packed tokens.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
from pathlib import Path

import torch

from .decode import Batch
from .draft import HeadDrafter
from .loading import target_fingerprint
from .plan import WIDEST, Costs, size_of
from .request import Request, Row, Stopping
from .target import Target
from .tree import TreeShape
from .verify import verify

NODES = (2, 4, 8, 16, 32, 60)  # of a row
MOST = 256  # tokens a pass
REPEATS = 12


class CostTable:
    """costs(rows, context), measured when first asked for and kept in `folder`."""

    def __init__(self, target: Target, drafter: HeadDrafter, mode: str, folder: Path) -> None:
        self.target, self.drafter = target, drafter
        weights = target_fingerprint(target.model)
        self.facts = (
            weights,
            str(target.dtype),
            device_name(target.device),
            torch.get_num_threads(),
            mode,
            torch.__version__,
            str(drafter.head.config),
            REPEATS,
            3,
        )
        name = hashlib.sha256(repr(self.facts).encode()).hexdigest()[:24]
        self.path = folder / f"costs-{name}.json"
        self.known: dict[str, dict] = {}
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):  # none yet, or one that cannot be read: measured anew
            found = None
        if isinstance(found, dict):
            self.known = found

    def __call__(self, rows: int, context: int) -> Costs:
        """For `rows` rows of about `context` tokens: both are rounded up, see `size_of`."""
        rows = size_of(rows)
        context = min(1 << max(context - 1, 127).bit_length(), self.target.max_positions // 2)
        key = f"{rows}x{context}"
        costs = read(self.known.get(key))
        if costs is None:
            self.known[key] = measure(self.target, self.drafter, rows, context)
            self._save()
            costs = read(self.known[key])
        return costs

    def _save(self) -> None:
        """A folder that cannot be written costs the next process a measurement, and is no reason to
        fail.
        """
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{os.getpid()}-{self.path.name}")
            part.write_text(json.dumps(self.known))
            os.replace(part, self.path)


def read(entry: dict | None) -> Costs | None:
    """What `measure` returned, as it comes back from JSON; None where it is not that."""
    try:
        target, head = ({int(k): float(entry[t][k]) for k in entry[t]} for t in ("target", "head"))
        costs = Costs(target, head, float(entry["plain"]))
    except (LookupError, TypeError, ValueError):
        return None
    values = [*target.values(), *head.values(), costs.plain]
    return costs if target and head and all(0 < ms < float("inf") for ms in values) else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"{platform.processor() or platform.machine()} {os.cpu_count()}"


@torch.inference_mode()
def measure(target: Target, drafter: HeadDrafter, rows: int, context: int) -> dict:
    """Milliseconds: see `Costs`."""
    device = target.device

    def fastest(work) -> float:
        """The least of some repeats: what else runs on the machine only ever adds."""
        work()
        spent = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(1e3 * (time.perf_counter() - started))
        return min(spent)

    def batch(head: HeadDrafter | None) -> Batch:
        """Rows in the middle of a generation: which numbers their slots hold does not change the
        time.
        """
        some = [Row(Request([1 + i % 7, 2], stopping=Stopping(10**6)), 10**6) for i in range(rows)]
        made = Batch(target, head, rows, context + 64, verify, None)
        made.admit(some)
        for cache in caches(made):
            cache.buffer.zero_()  # what nobody wrote may be NaN, and the tree of such scores is none
            cache.lengths = torch.full_like(cache.lengths, context)
            cache.host_lengths = [context] * rows
        return made

    def cycle(made: Batch) -> None:
        """One cycle that leaves the lengths where they were."""
        before = [(c, c.lengths, c.host_lengths) for c in caches(made)]
        made.settle()
        made.judge(made.expand())
        for cache, lengths, host in before:
            cache.lengths, cache.host_lengths = lengths, host

    def caches(made: Batch) -> list:
        return [made.cache] + ([made.drafter.cache] if made.drafter else [])

    drafter = copy.copy(drafter)
    drafter.reshape(WIDEST)
    speculative, plain = batch(drafter), batch(None)

    def drafted(*shape: int) -> float:
        """Whole cycles are timed, never a pass alone: between two runs of a pass, others use the
        caches of the processor."""
        speculative.drafter.reshape(TreeShape(*shape))
        return fastest(lambda: cycle(speculative))

    beams = min(5, speculative.drafter.shape.top_k)
    # three nodes whatever the depth, so that passes are all that differs
    head = {
        rows * k: max((drafted(3, 5, k) - drafted(3, 1, k)) / 4, 1e-3) for k in sorted({1, beams})
    }
    idle = fastest(lambda: cycle(plain))
    target, least = {}, float("inf")
    for nodes in sorted((n for n in NODES if n == 2 or n * rows <= MOST), reverse=True):
        # more tokens never cost less, and none less than plain decoding: the rest is noise
        least = min(least, drafted(nodes, 3, beams) - 3 * head[rows * beams])
        target[rows * nodes] = max(least, idle)
    return {"target": target, "head": head, "plain": idle}
