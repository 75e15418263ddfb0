"""What a step costs: seconds by phase, tokens/s, FLOP/s, memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import psutil
import torch
from torch import nn

from eagle.heads.head import DraftHead
from eagle.target import Target

# TFLOP/s of dense bf16 matrix products, as the makers state them without sparsity
PEAKS = dict(A100=312, L4=121, L40S=362, H100=989, H200=989, B200=2250, MI300X=1307)
PHASES = ("data", "target", "head", "backward", "optimizer")


def peak_flops(name: str, dtype: str) -> float | None:
    """FLOP/s that the device called `name` is sold for; None where unknown, and but for bf16."""
    found = [peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)]
    return found[0] * 1e12 if found and dtype == "bf16" else None


@dataclass(frozen=True)
class FlopCount:
    """FLOPs that a token and a supervised token of a step need, an estimate: 2 for a weight that is
    used, 6 for one that is trained (4 for the first, whose input needs no gradient). With S unrolled
    steps, H hidden, D draft vocabulary, V vocabulary, W_fc the head's fusion of features and W its
    decoder layers:

        token       2·W_target + 4·W_fc + 6·W     no W_target where features come from disk
        supervised  2·V·H_target + 6·(S-1)·W + 6·S·H·D

    Padding and what is recomputed do not count; attention scores and norms are left out.
    """

    token: int
    supervised: int

    @classmethod
    def of(cls, target: Target, head: DraftHead, steps: int, target_runs: bool = True) -> FlopCount:
        """target_runs: False where features come from disk."""
        h, used = head.config, weights_of(target.layers, target.config) if target_runs else 0
        layers = sum(weights_of(layer, h) for layer in head.decoder_layers)
        logits = steps * h.hidden_size * h.draft_vocab_size
        teacher = target.vocab_size * target.config.hidden_size
        token = 2 * used + 4 * weights_of(head.fc, h) + 6 * layers
        return cls(token, 2 * teacher + 6 * ((steps - 1) * layers + logits))

    def __call__(self, tokens: int, supervised: int) -> float:
        return float(tokens * self.token + supervised * self.supervised)


def weights_of(module: nn.Module, config) -> int:
    """Weights of the matrices that one token passes through; of experts, those it is sent to."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), 1)
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    total = 0.0
    for name, p in module.named_parameters():
        shape = getattr(p, "quant_state", p).shape  # bitsandbytes packs two weights into a byte
        if len(shape) > 1:
            total += prod(shape) * (share if ".experts." in f".{name}" else 1)
    return round(total)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that PyTorch holds on a GPU, or the resident set, and the maximum of it."""
    if device.type == "cuda":
        held, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"allocated": held, "peak_allocated": most}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    resident = psutil.Process().memory_info().rss
    return {"resident": resident, "peak_resident": max(peak, resident)}


@dataclass
class PerfMeter:
    """Times the phases of each step, and makes a row of every `every`-th (0: of none).

    A GPU only queues its work, so the time of a phase is known by waiting for it; that costs time,
    and is done in the steps that make a row.
    """

    device: torch.device
    flops: FlopCount
    every: int
    peak: float | None = None  # FLOP/s of all devices
    times: dict[str, float] = field(default_factory=dict)
    due: bool = False
    _since: list[dict] = field(default_factory=list)  # the steps since the last row

    def begin(self, step: int) -> None:
        """Before step number `step` (from 1)."""
        self.times = dict.fromkeys(PHASES, 0.0)
        self.due = self.every > 0 and step % self.every == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; in a profile it carries the name."""
        with torch.profiler.record_function(f"train.{name}"):
            self._wait()
            began = time.perf_counter()
            yield
            self._wait()
            self.times[name] += time.perf_counter() - began

    def _wait(self) -> None:
        if self.due and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, row: dict) -> dict | None:
        """A step's metrics -> where its time went and the rates since the last row, when due."""
        if self.every:
            self._since.append(row)
        if not self.due:
            return None
        steps, self._since = self._since, []
        wall = sum(1 / r["steps_per_second"] for r in steps)
        tokens, targets = (sum(r[key] for r in steps) for key in ("tokens", "targets"))
        whole = 1 / row["steps_per_second"]
        seconds = {**row["seconds"], "other": max(whole - sum(row["seconds"].values()), 0.0)}
        flops = self.flops(tokens, targets) / wall
        return {
            "step": row["step"],
            "steps": len(steps),
            "seconds_per_step": wall / len(steps),
            "seconds": seconds,
            "ratio": {name: spent / whole for name, spent in seconds.items()},
            "tokens_per_second": tokens / wall,
            "supervised_tokens_per_second": targets / wall,
            "gflops_per_second": flops / 1e9,
            **({"mfu": flops / self.peak} if self.peak else {}),
            "memory": memory(self.device),
        }
