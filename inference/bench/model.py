"""What a cycle should cost, and what speculation gains, by model, batch, context and device: a cost
model.

    python -m inference.bench.model --device h200 --params 8.03e9 --layers 32 --kv_heads 8
    --head_dim 128 \\
        --hidden 4096 --batch 1,8,32 --context 2048 --tree 60,7,10 --tau 6.23
    python -m inference.bench.model --calibrate docs/results/2026-11-21-cpu-cycle.json --check
    FILE.json

A pass reads its weights and the live keys and values, and multiplies. With p the device's
`overlap`:

    reading = (weights + keys and values) / bandwidth           multiplying = 2 * params * tokens /
    flops pass    = (reading^p + multiplying^p)^(1/p) + layers * layer_s cycle   = pass(target, rows
    * nodes) + ingest + depth * pass(head, rows * beams) + cycle_s speedup = tau * plain / cycle
    tau = 1 + a_1 + a_1 a_2 + …  (a_d: conditional acceptance)

Knows arithmetic and the bench's JSON; knows nothing of engines. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eagle.errors import EagleError
from eagle.tree import TreeShape


@dataclass(frozen=True)
class Device:
    """bandwidth: bytes a second; flops: a second, of 16-bit products. overlap p: 1, reading and
    multiplying take
    turns; large, the longer of them counts. layer_s: what a layer costs beside both (launches,
      small kernels).
    cycle_s: a speculative cycle beside its passes; plain_s: a plain step beside its pass; draft_s,
      draft_token_s:
    a pass of the head, and each of its tokens, beside what the other constants say."""

    name: str
    bandwidth: float
    flops: float
    overlap: float = 4.0
    layer_s: float = 1e-5
    cycle_s: float = 1e-4
    plain_s: float = 2e-5
    draft_s: float = 2e-5
    draft_token_s: float = 0.0
    source: str = ""


LAUNCHES = "launch costs assumed: passes in CUDA graphs"
DEVICES = {
    device.name: device
    for device in (
        Device(
            "h200",
            4.3e12,
            7.9e14,
            source="copy and 8192^3 bf16 product as others measured them; " + LAUNCHES,
        ),
        Device(
            "h100", 3.0e12, 7.9e14, source="0.9 of the data sheet's 3.35 TB/s, assumed; " + LAUNCHES
        ),
        Device(
            "a100",
            1.8e12,
            2.5e14,
            source="0.9 of 2.0 TB/s and 0.8 of 312 TFLOP/s, assumed; " + LAUNCHES,
        ),
        Device(
            "b200",
            7.2e12,
            1.7e15,
            source="0.9 of 8 TB/s and 0.75 of 2.25 PFLOP/s, assumed; " + LAUNCHES,
        ),
        Device(
            "h200-eager",
            4.3e12,
            7.9e14,
            layer_s=4e-4,
            cycle_s=2e-3,
            plain_s=2e-4,
            draft_s=2e-4,
            source="as h200; 60 launches a layer of 6 to 7 microseconds, assumed",
        ),
    )
}


@dataclass(frozen=True)
class Model:
    """read: parameters that a pass of the target reads (all but an untied embedding); head: of the
    draft head.
    kv: bytes of keys and values a token, all layers."""

    read: float
    head: float
    layers: int
    kv: float
    weight_bytes: float = 2.0
    head_bytes: float = 2.0

    @classmethod
    def of(
        cls,
        params: float,
        layers: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        *,
        vocab: int = 128256,
        draft_vocab: int = 32000,
        intermediate: int | None = None,
        weight_bytes: float = 2.0,
    ) -> Model:
        """A Llama-shaped model with an untied embedding, and an EAGLE-3 head of one layer with its
        MLP.
        """
        wide = intermediate or 3.5 * hidden
        head = 3 * hidden**2 + 3 * hidden * wide + draft_vocab * hidden
        head += 3 * hidden**2 + 4 * hidden * kv_heads * head_dim  # q, o; k and v read 2 * hidden
        return cls(
            params - vocab * hidden,
            head,
            layers,
            2 * layers * kv_heads * head_dim * 2,
            weight_bytes,
        )


EMBEDDED = Model(13.6e6, 2.43e6, 16, 2 * 16 * 2 * 64 * 2)  # the shipped model and head


@dataclass(frozen=True)
class Prediction:
    """Milliseconds; tokens_per_second of all rows together."""

    plain_ms: float
    verify_ms: float
    draft_ms: float
    cycle_ms: float
    speedup: float
    tokens_per_second: float

    @property
    def break_even(self) -> float:
        """The acceptance length from which speculation pays."""
        return self.cycle_ms / self.plain_ms


def pass_s(
    device: Device, params: float, weight_bytes: float, tokens: float, kv_read: float, layers: int
) -> float:
    reading = (params * weight_bytes + kv_read) / device.bandwidth
    multiplying = 2 * params * tokens / device.flops
    p = device.overlap
    return (reading**p + multiplying**p) ** (1 / p) + layers * device.layer_s


def predict(
    model: Model,
    device: Device,
    tree: TreeShape | str,
    tau: float,
    rows: int = 1,
    context: int = 512,
) -> Prediction:
    """tau: tokens gained a cycle and row, which only a measurement with the head tells
    (`tau_of`).
    """
    shape = TreeShape.parse(tree)
    live = rows * context
    plain = device.plain_s + pass_s(
        device, model.read, model.weight_bytes, rows, live * model.kv, model.layers
    )
    verify = pass_s(
        device,
        model.read,
        model.weight_bytes,
        rows * shape.num_nodes,
        live * model.kv,
        model.layers,
    )

    def drafting(tokens: float) -> float:
        read = live * model.kv / model.layers
        own = device.draft_s + tokens * device.draft_token_s
        return own + pass_s(device, model.head, model.head_bytes, tokens, read, 1)

    draft = drafting(rows * tau) + shape.depth * drafting(rows * shape.top_k)
    cycle = verify + draft + device.cycle_s
    return Prediction(
        1e3 * plain, 1e3 * verify, 1e3 * draft, 1e3 * cycle, tau * plain / cycle, rows * tau / cycle
    )


def tau_of(rates: list[float]) -> float:
    """Conditional acceptance by depth -> acceptance length, the target's own token included."""
    if not all(0 <= rate <= 1 for rate in rates):
        raise EagleError(f"acceptance rates lie in 0 … 1, not {rates}")
    return 1 + sum(itertools.accumulate(rates, lambda a, b: a * b))


def calibrate(runs: list[dict], model: Model, name: str) -> Device:
    """A device from compiled runs of `inference.bench`, by least squares of relative errors.
    overlap is 1: what is measured grows by a constant a token. Context is left to the bandwidth;
    the bench's is short."""
    rows, times = [], []
    for run in runs:
        b, ms = run["batch_size"], run["cycle_ms"]
        if run["engine"] == "vanilla_compiled":
            # a pass, its tokens; a cycle's rest, a head's pass, its tokens
            rows.append([1, b, 0, 0, 0])
            times.append(ms)
        elif run["engine"] == "eagle_compiled":
            shape = TreeShape.parse(run["tree"])
            rows.append([1, b * shape.num_nodes, 1, 0, 0])
            times.append(run["verify_ms"] + run["commit_ms"])
            drafted = b * (shape.depth * shape.top_k + run["tau"])
            rows.append([0, 0, 0, shape.depth + 1, drafted])
            times.append(run["draft_ms"])
    if not times or not any(row[2] for row in rows) or not any(not any(row[2:]) for row in rows):
        raise EagleError(
            "calibration needs vanilla_compiled and eagle_compiled runs; give a JSON of "
            "python -m inference.bench --engines vanilla_compiled,eagle_compiled"
        )
    weighed = np.array(rows, dtype=float) / np.array(times)[:, None]
    found = np.maximum(np.linalg.lstsq(weighed, np.ones(len(times)), rcond=None)[0], 1e-6)
    whole, token, rest, head, beam = (1e-3 * found).tolist()
    bandwidth, flops = model.read * model.weight_bytes / whole, 2 * model.read / token
    return Device(
        name,
        bandwidth,
        flops,
        overlap=1.0,
        layer_s=0.0,
        cycle_s=rest,
        plain_s=0.0,
        # what was measured of the head beyond what the target's bandwidth and rate say
        draft_s=max(head - model.head * model.head_bytes / bandwidth, 0.0),
        draft_token_s=max(beam - 2 * model.head / flops, 0.0),
        source="fitted to measured cycles",
    )


def from_suite(data: dict) -> tuple[Model, Device]:
    """Model and device of a GPU suite's engine.json: the copy's bandwidth, and what passes cost
    beyond it.
    """
    facts = first(data, "model")
    plain = first(data, "plain", rows=1)
    draft = first(data, "draft", rows=1)
    layers, kv, head = facts["layers"], facts["kv_bytes_per_token"], facts["head_bytes"]
    model = Model(facts["target_bytes"] / 2, head / 2, layers, kv)
    bandwidth = facts["copy_bytes_per_second"]
    read = (facts["target_bytes"] + plain["context"] * kv) / bandwidth
    rest = max(1e-3 * plain["graphed_ms"] - read, 0.0)
    device = replace(
        DEVICES["h200"],
        name=data["environment"]["accelerator"] or data["device"],
        bandwidth=bandwidth,
        layer_s=rest / layers,
        plain_s=0.0,
        source="copy, plain step and draft pass measured; flops and overlap as h200",
    )
    spent = 1e-3 * draft["per_pass_ms"] - head / bandwidth - device.layer_s
    return model, replace(device, draft_s=max(spent, 0.0))


def first(data: dict, kind: str, **settings) -> dict:
    for case in data["cases"]:
        if case["kind"] == kind and all(case.get(k) == v for k, v in settings.items()):
            if "error" not in case and "skipped" not in case:
                return case
    raise EagleError(f"the file has no case {kind} that ran; run --stage engine again")


@dataclass(frozen=True)
class Check:
    """A measured run beside its prediction: cycle over plain step, of the same file and batch."""

    batch: int
    tree: str
    tau: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(runs: list[dict], model: Model, device: Device) -> list[Check]:
    """Of every compiled run that drafts a fixed tree: the cost of a cycle in plain steps. A ratio,
    because the same machine is faster on one day than on another."""
    plain = {
        (r["batch_size"], r["temperature"], r["capacity"]): r["cycle_ms"]
        for r in runs
        if r["engine"] == "vanilla_compiled"
    }
    found = []
    for run in runs:
        key = run["batch_size"], run["temperature"], run["capacity"]
        if run["engine"] == "eagle_compiled" and key in plain:
            made = predict(model, device, run["tree"], run["tau"], run["batch_size"], 128)
            measured = run["cycle_ms"] / plain[key]
            found.append(Check(key[0], run["tree"], run["tau"], measured, made.break_even))
    return found


def head_training(
    model: Model,
    hidden: int,
    device: Device,
    *,
    gpus: int,
    mfu: float,
    steps: int,
    tokens_a_step: int,
) -> dict[str, float]:
    """Training a head on `gpus` devices: tokens a second with the target run along (online) and
    with its features read from a store (offline), and what store and network must carry. steps:
    unrolled; tokens_a_step: of one device. A token is 2 FLOP a parameter forward and 4 backward,
    and the head runs once a step."""
    target, head = 2 * model.read, 6 * model.head * steps
    rate = gpus * device.flops * mfu
    kept = (
        4 * hidden * 2
    )  # three feature layers and the last hidden state, which the teacher's logits are of
    gradients = (
        2 * model.head * 2 * (gpus - 1) / gpus
    )  # ring all-reduce, 16 bits, sent by each device
    online, offline = rate / (target + head), rate / head
    each = offline / gpus / tokens_a_step  # steps a second of one device
    return {
        "flops_a_token": target + head,
        "online_tokens_per_s": online,
        "offline_tokens_per_s": offline,
        "feature_bytes_a_token": kept,
        "store_read_bytes_per_s": offline * kept,
        "store_read_bytes_per_s_a_gpu": offline * kept / gpus,
        "gradient_bytes_a_step_a_gpu": gradients,
        "gradient_bytes_per_s_a_gpu": gradients * each,
    }


def read_runs(path: str) -> list[dict]:
    return read_json(path).get("runs", [])


def read_json(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EagleError(
            f"{path} cannot be read: {error}; give a JSON of inference.bench"
        ) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="h200", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--params", type=float, default=8.03e9)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--weight_bytes", type=float, default=2.0)
    parser.add_argument("--batch", default="1", help="rows, or a list of them: 1,8,32")
    parser.add_argument("--context", default="2048", help="tokens, or a list of them")
    parser.add_argument("--tree", default="60,7,10")
    parser.add_argument("--tau", type=float, help="acceptance length; or give --acceptance")
    parser.add_argument("--acceptance", help="conditional rates by depth: 0.8,0.75,0.7")
    parser.add_argument(
        "--calibrate", nargs="+", help="bench JSON files, or one engine.json of the GPU suite"
    )
    parser.add_argument(
        "--check", nargs="+", help="bench JSON files of the embedded model to compare with"
    )
    parser.add_argument("--train_gpus", type=int, help="also: training a head on that many devices")
    options = parser.parse_args(argv)
    try:
        return answer(options)
    except EagleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def answer(options: argparse.Namespace) -> int:
    if options.device not in DEVICES:
        raise EagleError(f"unknown device {options.device!r}; use one of {', '.join(DEVICES)}")
    device = DEVICES[options.device]
    model = Model.of(
        options.params,
        options.layers,
        options.kv_heads,
        options.head_dim,
        options.hidden,
        vocab=options.vocab,
        weight_bytes=options.weight_bytes,
    )
    if model.read <= 0:
        raise EagleError(
            f"--params {options.params:g} is less than the embedding; give --vocab and --hidden"
        )
    if options.calibrate:
        data = read_json(options.calibrate[0])
        if "cases" in data:
            model, device = from_suite(data)
        else:
            runs = [run for path in options.calibrate for run in read_runs(path)]
            model, device = EMBEDDED, calibrate(runs, EMBEDDED, "fitted")
    print(
        f"{device.name}: {device.bandwidth / 1e9:.4g} GB/s, {device.flops / 1e12:.4g} TFLOP/s, overlap "
        f"{device.overlap:g}, layer {1e6 * device.layer_s:.3g} us, cycle {1e6 * device.cycle_s:.3g} us; {device.source}"
    )
    if options.check:
        show_checks(options.check, model, device)
        return 0
    if (options.tau is None) == (options.acceptance is None):
        raise EagleError("give --tau, or --acceptance by depth, one of them")
    tau = options.tau if options.tau is not None else tau_of(numbers(options.acceptance, float))
    print(
        f"{'batch':>6} {'context':>8} {'plain ms':>9} {'cycle ms':>9} {'pays from tau':>14} {'speedup':>8} {'tokens/s':>9}"
    )
    for rows, context in itertools.product(
        numbers(options.batch, int), numbers(options.context, int)
    ):
        made = predict(model, device, options.tree, tau, rows, context)
        print(
            f"{rows:>6} {context:>8} {made.plain_ms:>9.3f} {made.cycle_ms:>9.3f} {made.break_even:>14.2f} "
            f"{made.speedup:>8.2f} {made.tokens_per_second:>9.0f}"
        )
    if options.train_gpus:
        found = head_training(
            model,
            options.hidden,
            device,
            gpus=options.train_gpus,
            mfu=0.4,
            steps=7,
            tokens_a_step=16384,
        )
        for name, value in found.items():
            print(f"{name:>30} {value:.4g}")
    return 0


def show_checks(paths: list[str], model: Model, device: Device) -> None:
    errors = []
    for path in paths:
        for c in check(read_runs(path), model, device):
            errors.append(abs(c.error))
            print(
                f"{Path(path).name}: batch {c.batch}, tree {c.tree}: a cycle is {c.measured:.2f} plain steps, predicted "
                f"{c.predicted:.2f} ({c.error:+.0%}); speedup {c.tau / c.measured:.2f}, predicted {c.tau / c.predicted:.2f}"
            )
    if not errors:
        raise EagleError("no run to check: a file needs vanilla_compiled and eagle_compiled")
    print(f"mean error {statistics.mean(errors):.0%}, largest {max(errors):.0%}, of {len(errors)}")


def numbers(text: str, kind: type) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise EagleError(f"{text!r} is not a list of numbers; write for instance 1,8,32") from None
    if any(value <= 0 for value in values if kind is int):
        raise EagleError(f"{text!r}: numbers must be above 0")
    return values


if __name__ == "__main__":
    sys.exit(main())
