"""What a cycle should cost, and what speculation gains, by model, batch, context and device.

docs/scaling.md has the formulas. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from eagle.errors import EagleError
from eagle.tree import TreeShape
from inference.bench.engines import parse_numbers
from inference.bench.record import Record
from inference.bench.report import Section, tabulate


@dataclass(frozen=True)
class Device:
    """bandwidth: bytes a second; flops: 16-bit products a second. overlap p: 1, reading and
    multiplying take turns; large, the longer one counts. layer_s: what a layer costs beside both.
    cycle_s: a cycle beside its passes; plain_s: a plain step beside its pass. draft_s and
    draft_token_s: a pass of the head, and each of its tokens, beside the rest.
    """

    bandwidth: float
    flops: float
    overlap: float = 4.0
    layer_s: float = 1e-5
    cycle_s: float = 1e-4
    plain_s: float = 2e-5
    draft_s: float = 2e-5
    draft_token_s: float = 0.0


# launch costs are assumed (passes in CUDA graphs). h200: as others measured a copy and an 8192^3
# product; the others: 0.9 of the data sheet's bandwidth, 0.75 to 0.8 of its flops
H200 = Device(4.3e12, 7.9e14)
DEVICES = {
    "h200": H200,
    "h100": Device(3.0e12, 7.9e14),
    "a100": Device(1.8e12, 2.5e14),
    "b200": Device(7.2e12, 1.7e15),
    # 60 launches a layer of 6 to 7 microseconds
    "h200-eager": replace(H200, layer_s=4e-4, cycle_s=2e-3, plain_s=2e-4, draft_s=2e-4),
}


@dataclass(frozen=True)
class Model:
    """read: parameters that a pass of the target reads; head: parameters of the draft head. kv:
    bytes of keys and values a token, all layers."""

    read: float
    head: float
    layers: int
    kv: float
    weight_bytes: float = 2.0


def llama_like(
    params: float, layers: int, kv_heads: int, head_dim: int, hidden: int, vocab: int = 128256
) -> Model:
    """A Llama-shaped model with an untied embedding, and an EAGLE-3 head of one layer, its MLP 3.5
    times as wide as `hidden`, with 32,000 draft tokens."""
    read = params - vocab * hidden
    if read <= 0:
        raise EagleError(f"--params {params:g}: less than the embedding; give --vocab and --hidden")
    attention = 3 * hidden**2 + 4 * hidden * kv_heads * head_dim  # q, o; k, v of 2 * hidden
    head = 3 * hidden**2 + attention + 3 * hidden * 3.5 * hidden + 32000 * hidden
    return Model(read, head, layers, 2 * layers * kv_heads * head_dim * 2)


EMBEDDED = Model(13.6e6, 2.43e6, 16, 2 * 16 * 2 * 64 * 2)  # the shipped model and head


def predict(
    model: Model, device: Device, tree: str, tau: float, rows: int = 1, context: int = 512
) -> dict[str, float]:
    """Milliseconds; the tau from which speculation pays; tokens a second of all rows. tau: tokens
    gained a cycle and row, which only a measurement with the head tells."""
    shape, live = TreeShape.parse(tree), rows * context * model.kv

    def pass_s(params: float, weight_bytes: float, tokens: float, kv: float, layers: int) -> float:
        reading = (params * weight_bytes + kv) / device.bandwidth
        multiplying, p = 2 * params * tokens / device.flops, device.overlap
        return (reading**p + multiplying**p) ** (1 / p) + layers * device.layer_s

    def target(tokens: float) -> float:
        return pass_s(model.read, model.weight_bytes, tokens, live, model.layers)

    def head(tokens: float) -> float:
        own = device.draft_s + tokens * device.draft_token_s
        return own + pass_s(model.head, 2.0, tokens, live / model.layers, 1)

    plain = device.plain_s + target(rows)
    verify = target(rows * shape.num_nodes)
    draft = head(rows * tau) + shape.depth * head(rows * shape.top_k)
    cycle = verify + draft + device.cycle_s
    return {
        "plain_ms": 1e3 * plain,
        "verify_ms": 1e3 * verify,
        "draft_ms": 1e3 * draft,
        "cycle_ms": 1e3 * cycle,
        "pays_from": cycle / plain,
        "speedup": tau * plain / cycle,
        "tokens_per_second": rows * tau / cycle,
    }


def tau_of(rates: list[float]) -> float:
    """Conditional acceptance by depth -> acceptance length, the target's own token included."""
    if not all(0 <= rate <= 1 for rate in rates):
        raise EagleError(f"acceptance rates lie in 0 … 1, not {rates}")
    return 1 + sum(itertools.accumulate(rates, lambda a, b: a * b))


def fit(runs: list[dict], model: Model) -> Device:
    """A device from the bench's compiled runs, by least squares of relative errors. overlap is 1:
    what is measured grows by a constant a token. Contexts are taken to be short."""
    rows, times = [], []
    for run in runs:
        b, ms = run["batch_size"], run["cycle_ms"]
        if run["engine"] == "vanilla_compiled":
            # a pass, its tokens; a cycle's rest, a head's pass, its tokens
            rows.append([1, b, 0, 0, 0])
            times.append(ms)
        elif run["engine"] == "eagle_compiled":
            shape = TreeShape.parse(run["tree"])
            drafted = b * (shape.depth * shape.top_k + run["tau"])
            rows.append([1, b * shape.num_nodes, 1, 0, 0])
            rows.append([0, 0, 0, shape.depth + 1, drafted])
            times += [run["verify_ms"] + run["commit_ms"], run["draft_ms"]]
    if not {"vanilla_compiled", "eagle_compiled"} <= {run["engine"] for run in runs}:
        raise EagleError(
            "calibration needs vanilla_compiled and eagle_compiled runs; give a JSON of "
            "python -m inference.bench --engines vanilla_compiled,eagle_compiled"
        )
    weighed = np.array(rows, dtype=float) / np.array(times)[:, None]
    found = np.maximum(np.linalg.lstsq(weighed, np.ones(len(times)), rcond=None)[0], 1e-6)
    whole, token, rest, head, beam = (1e-3 * found).tolist()
    bandwidth, flops = model.read * model.weight_bytes / whole, 2 * model.read / token
    # of the head: what was measured beyond what the target's bandwidth and rate say
    draft_s = max(head - 2 * model.head / bandwidth, 0.0)
    draft_token_s = max(beam - 2 * model.head / flops, 0.0)
    return Device(bandwidth, flops, 1.0, 0.0, rest, 0.0, draft_s, draft_token_s)


def read_runs(path: str) -> list[dict]:
    try:
        return json.loads(Path(path).read_text("utf-8"))["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise EagleError(f"{path} cannot be read: {error}; give JSON of inference.bench") from None


def model(
    *,
    device: str = "h200",
    params: float = 8.03e9,
    layers: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    hidden: int = 4096,
    vocab: int = 128256,
    weight_bytes: float = 2.0,
    batch: str = "1",
    context: str = "2048",
    tree: str = "60,7,10",
    tau: float | None = None,
    acceptance: str | None = None,
    calibrate: str | None = None,
    json: str | None = None,
    report: str | None = None,
) -> None:
    """Calculate what a cycle costs and from which acceptance length on speculation pays.

    --device h200, h100, a100, b200 or h200-eager. --batch and --context take lists. --tau, or
    conditional rates by depth: --acceptance 0.8,0.75,0.7. --calibrate: this machine, from bench
    JSON files a,b,… of the embedded model's compiled engines.
    """
    record = Record("model", model, dict(locals()))
    if device not in DEVICES:
        raise EagleError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if calibrate:
        runs = [run for path in calibrate.split(",") for run in read_runs(path)]
        target, constants = EMBEDDED, fit(runs, EMBEDDED)
    else:
        target = llama_like(params, layers, kv_heads, head_dim, hidden, vocab)
        target, constants = replace(target, weight_bytes=weight_bytes), DEVICES[device]
    if (tau is None) == (acceptance is None):
        raise EagleError("give --tau, or --acceptance by depth, one of them")
    gained = tau or tau_of(parse_numbers("acceptance", acceptance, float))
    sizes = parse_numbers("batch", batch), parse_numbers("context", context)
    for rows, length in itertools.product(*sizes):
        made = predict(target, constants, tree, gained, rows, length)
        record.runs.append({"batch": rows, "context": length, "tau": gained, **made})
    columns = {"batch": "batch", "context": "context", "plain ms": "plain_ms:.3f"}
    columns |= {"cycle ms": "cycle_ms:.3f", "pays from tau": "pays_from:.2f"}
    columns |= {"speedup": "speedup:.2f", "tokens/s": "tokens_per_second:.0f"}
    result = record.result(modelled=device, constants=asdict(constants))
    sections = [Section("Prediction", tabulate(record.runs, **columns))]
    record.hand_over(result, f"cost model of {device}", sections)
