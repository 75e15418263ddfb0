"""What a step costs: seconds by phase, tokens/s, FLOP/s, memory. Knows clocks and shapes; no loss,
no data.

T tokens of a step (padding not counted), n mean row length, M supervised tokens, S unrolled steps,
H hidden, D draft vocabulary, V vocabulary, A query heads x head_dim, L layers.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from eagle.heads.head import DraftHead
from eagle.target import Target

# dense bf16 matrix products, FLOP/s, as the makers state them without sparsity; the longest name
# wins
PEAKS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}

# the loop's phases -> the names under which they are reported
NAMES = {
    "data": "data",
    "target": "target",
    "head": "head",
    "backward": "backward",
    "step": "optimizer",
}


def peak_flops(name: str, dtype: str) -> float | None:
    """FLOP/s that the device called `name` is sold for; None where unknown, and for all but
    bf16.
    """
    words = name.replace("-", " ").split()
    found = [known for known in PEAKS if _within(known.split(), words)]
    return PEAKS[max(found, key=len)] if found and dtype == "bf16" else None


def _within(part: list[str], words: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words)))


@dataclass(frozen=True)
class FlopCount:
    """FLOPs that a step of this method needs, however it is implemented: what is padded, recomputed
    or masked away does not count (as in Chowdhery et al. 2022, appendix B).

    A product with W weights is 2W a token; its backward pass is 2W for the weights and 2W for what
    entered, which the first layer `fc` does not need. Scores and sums of causal attention are 2·A·n
    a token forward (half of 4·A·n), and twice that backward.

        target   T · (2·W_target + 2·L·A·n)             forward only; none where features come from
        disk teacher  M · 2·V·H_target                       its logits, at supervised positions
        head     T · (4·W_fc + 6·W_kv)                  step 0: every position is a key
                 M · (6·(W_layer - W_kv) + 6·A·n)       step 0: the rest of supervised positions
                 (S-1) · M · (6·W_layer + 6·A·n)        later steps (T + (S-1) · M) · (6·W_below +
                 6·(L_head-1)·A·n)   layers below the last S · M · 6·H·D
                 the draft logits (S-1) · M · 6·W_fc, - S · M · 2·H·D    EAGLE-1: `fc` in every
                 step, the target's LM head

    n stands for rows of one length; with rows of several, attention is counted a little low. Norms,
    activations and the loss are left out.
    """

    target_weights: int  # a token passes through; of experts those that are active
    target_attention: int  # L·A
    target_logits: int  # V·H_target
    fc: int
    layer: int
    keys: int  # W_kv, of W_layer
    head_attention: int
    draft_logits: int
    steps: int
    below: int = 0  # W_below, of all layers but the last
    layers: int = 1  # L_head
    own_output: bool = True

    @classmethod
    def of(cls, target: Target, head: DraftHead, steps: int, target_runs: bool = True) -> FlopCount:
        """target_runs: False where features come from disk."""
        c, h = target.config, head.config
        heads = c.num_attention_heads
        width = heads * (getattr(c, "head_dim", None) or c.hidden_size // heads)
        *below, last = (
            sum(p.numel() for p in layer.parameters() if p.ndim == 2)
            for layer in head.decoder_layers
        )
        attention = head.decoder_layers[-1].self_attn
        keys = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
        return cls(
            active_weights(target.layers, c) if target_runs else 0,
            len(target.layers) * width if target_runs else 0,
            target.vocab_size * c.hidden_size,
            head.fc.weight.numel(),
            last,
            keys,
            h.num_attention_heads * h.head_dim,
            h.hidden_size * h.draft_vocab_size,
            steps,
            sum(below),
            h.num_layers,
            head.has_output,
        )

    def __call__(self, tokens: int, supervised: int, rows: int) -> float:
        """FLOPs of a step over `tokens` tokens in `rows` rows, `supervised` of them targets."""
        n = tokens / max(rows, 1)
        layer = 6 * self.layer + 6 * self.head_attention * n
        total = tokens * (4 * self.fc + 6 * self.keys) + supervised * (layer - 6 * self.keys)
        later = (self.steps - 1) * supervised
        lower = 6 * self.below + 6 * (self.layers - 1) * self.head_attention * n
        total += later * layer + (tokens + later) * lower
        total += self.steps * supervised * (6 if self.own_output else 4) * self.draft_logits
        total += 0 if self.own_output else later * 6 * self.fc
        total += supervised * 2 * self.target_logits
        total += tokens * 2 * (self.target_weights + self.target_attention * n)
        return float(total)


def active_weights(layers: nn.Module, config) -> int:
    """Weights of the matrices that one token passes through; of experts, those that it is sent
    to.
    """
    experts = 0
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        experts = experts or getattr(config, name, None) or 0
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None) or experts
    total = 0.0
    for name, p in layers.named_parameters():
        packed = getattr(p, "quant_state", None)  # bitsandbytes stores two weights a byte
        shape = packed.shape if packed is not None else p.shape
        if len(shape) < 2 or "lora_" in name:
            continue
        share = used / experts if experts and ".experts." in f".{name}" else 1.0
        total += torch.Size(shape).numel() * share
    return round(total)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes. GPU: what PyTorch holds, and held at the most. CPU: the resident set and its
    maximum.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak_allocated": torch.cuda.max_memory_allocated(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # only Linux tells the present size
        return {"peak_resident": peak}
    return {"resident": resident, "peak_resident": max(peak, resident)}


def gpu_utilization(device: torch.device) -> int | None:
    """Percent of the last sampling period in which the GPU was busy; None where nobody can tell (no
    GPU, no NVML)."""
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.utilization(device))
    except (
        Exception
    ):  # torch raises ModuleNotFoundError, RuntimeError and pynvml's own: all mean "unknown"
        return None


@dataclass
class PerfMeter:
    """Phases of a step, and every `every` steps a row of averages.

    On a GPU work is only queued, so a clock that does not wait shows where the host waited. Waiting
      at
    each phase costs time: it is done on every `every`-th step alone, and `seconds` are that step's.
    On a CPU they are means over the steps since the last row.
    """

    device: torch.device
    flops: FlopCount
    every: int  # 0: no rows
    world_size: int = 1
    peak: float | None = None  # of one device
    times: dict[str, float] = field(default_factory=dict)
    waits: bool = False
    _steps: int = 0
    _wall: float = 0.0
    _counted: dict[str, float] = field(default_factory=dict)
    _phases: dict[str, float] = field(default_factory=dict)
    _timed: list[float] = field(default_factory=list)  # seconds of the steps that `_phases` is of

    def begin(self, step: int) -> None:
        """Before step number `step` (from 1)."""
        self.times = dict.fromkeys(NAMES, 0.0)
        self.waits = self.device.type == "cuda" and self.every > 0 and step % self.every == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; in a profile it carries the name."""
        with torch.profiler.record_function(f"train.{name}"):
            self._wait()
            began = time.perf_counter()
            yield
            self._wait()
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - began

    def _wait(self) -> None:
        if self.waits:
            torch.cuda.synchronize(self.device)

    def add(self, row: dict, rows: int) -> dict | None:
        """A step's metrics, `rows` of data in it -> the averages when they are due."""
        if not self.every:
            return None
        seconds = 1 / row["steps_per_second"]
        self._steps += 1
        self._wall += seconds
        counts = {
            "tokens": row["tokens"],
            "supervised_tokens": row["targets"],
            "flops": self.flops(row["tokens"], row["targets"], rows),
        }
        for key, value in counts.items():
            self._counted[key] = self._counted.get(key, 0.0) + value
        if self.device.type != "cuda" or self.waits:
            self._timed.append(seconds)
            for name, spent in row["seconds"].items():
                self._phases[name] = self._phases.get(name, 0.0) + spent
        return self._flush(row["step"]) if row["step"] % self.every == 0 else None

    def _flush(self, step: int) -> dict:
        seconds = {NAMES.get(k, k): v for k, v in self._phases.items()}
        seconds["forward"] = seconds.get("target", 0.0) + seconds.get("head", 0.0)
        whole = sum(self._timed)
        parts = sum(v for k, v in seconds.items() if k != "forward")
        seconds["other"] = max(whole - parts, 0.0)
        rate = {k: v / self._wall for k, v in self._counted.items()}
        out = {
            "step": step,
            "steps": self._steps,
            "seconds_per_step": self._wall / self._steps,
            "seconds": {k: v / len(self._timed) for k, v in seconds.items()},
            "ratio": {k: v / whole for k, v in seconds.items()},
            "tokens_per_second": rate["tokens"],
            "supervised_tokens_per_second": rate["supervised_tokens"],
            "flops_per_step": self._counted["flops"] / self._steps,
            "gflops_per_second": rate["flops"] / 1e9,
            "memory": memory(self.device),
        }
        if self.peak:
            out["mfu"] = rate["flops"] / (self.peak * self.world_size)
        if (busy := gpu_utilization(self.device)) is not None:
            out["gpu_utilization"] = busy
        self._steps, self._wall = 0, 0.0
        self._counted, self._phases, self._timed = {}, {}, []
        return out
