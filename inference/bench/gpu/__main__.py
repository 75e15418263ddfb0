"""Measure kernels, engine and training on a GPU, a JSON file a stage; docs/gpu.md says what each
field means.

    python -m inference.bench.gpu --stage all --size full --out runs/gpu
    python -m inference.bench.gpu --stage engine --size toy --device cpu --out runs/gpu

Toy size runs anywhere in a minute and shows that everything runs; only full size on a GPU judges
goals.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

STAGES = ("correctness", "kernels", "engine", "training")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--size", choices=("toy", "full"), default="full")
    parser.add_argument("--out", default="runs/gpu", help="folder of STAGE.json and summary.json")
    parser.add_argument("--budget_s", type=float, default=540.0, help="seconds of a stage")
    parser.add_argument("--device", default=None, help="cuda, or cpu; by default what there is")
    parser.add_argument("--revision", default=None, help="the commit, where no git folder tells it")
    options = parser.parse_args(argv)

    from eagle.errors import EagleError

    try:
        return measure(options)
    except EagleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def measure(options: argparse.Namespace) -> int:
    import torch

    from eagle.errors import EagleError

    from .record import summarise

    there = torch.cuda.is_available()
    device = torch.device(options.device or ("cuda" if there else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise EagleError(f"--device {device} is not measured here; use cuda or cpu")
    if device.type == "cuda" and not there:
        raise EagleError("torch sees no GPU; use --device cpu --size toy, or check the driver")
    if device.type == "cpu" and options.size == "full":
        raise EagleError("full size needs a GPU; use --size toy on a CPU")
    if options.budget_s <= 0:
        raise EagleError(f"--budget_s {options.budget_s:g} must be above 0")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    out = Path(options.out)
    if options.stage != "all":
        stage(options, device, out)
    elif device.type == "cuda":
        # each in a process of its own: an error that the device keeps ends with it
        for name in STAGES:
            command = [
                sys.executable,
                "-m",
                "inference.bench.gpu",
                "--stage",
                name,
                "--size",
                options.size,
                "--out",
                str(out),
                "--budget_s",
                str(options.budget_s),
                "--device",
                str(device),
            ]
            if options.revision is not None:
                command += ["--revision", options.revision]
            ended = subprocess.run(command, check=False).returncode
            if ended:
                print(
                    f"{name}: its process ended with {ended}; {out / name}.json has what it did",
                    file=sys.stderr,
                )
    else:
        for name in STAGES:
            options.stage = name
            stage(options, device, out)
    show(summarise(out))
    return 0


def stage(options: argparse.Namespace, device, out: Path) -> None:
    import importlib

    from .record import Record
    from .sizes import SIZES

    names = {"kernels": "speed"}
    module = importlib.import_module(
        f".{names.get(options.stage, options.stage)}", "inference.bench.gpu"
    )
    record = Record(options.stage, options.size, out, device, options.budget_s, options.revision)
    record.finish(module.run(record, SIZES[options.size], device))


def show(summary: dict) -> None:
    for name, stage in summary["stages"].items():
        state = "complete" if stage["complete"] else "not complete"
        print(
            f"{name}: {stage['cases']} cases, {stage['failed']} failed, {stage['skipped']} skipped, "
            f"{stage['seconds']:.0f} s, {state}"
        )
    for goal in summary["goals"]:
        value = "-" if goal["value"] is None else f"{goal['value']:.4g}"
        print(f"{goal['verdict']:>12}  {goal['name']}: {value} ({goal['bound']})")


if __name__ == "__main__":
    sys.exit(main())
