"""`make demo`: the main job on the embedded model, in a few minutes on two CPU cores.

Looks at a training sample, trains a draft head from scratch on fill-in-the-middle data, then
measures the shipped head against stock `generate`. Each step is a command that can be typed by
hand; it is shown first.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from configs import cli
from examples.steps import call, words


def demo(*, output: str = "runs/demo", minutes: float = 2.0, num_prompts: int = 8) -> int:
    """Inspect, train for `minutes`, benchmark. Everything goes to --output (a new numbered folder
    if taken)."""
    console = Console(highlight=False, soft_wrap=True)  # paths stay whole, for copying
    folder, number = Path(output), 2
    while folder.exists():
        folder, number = Path(f"{output}-{number}"), number + 1
    head, bench = folder / "head", folder / "bench.json"
    look = "train.inspect --data_format fim --num 1"
    train = f"train.main --data_format fim --config demo train.time_budget_minutes={minutes}"
    measure = "inference.bench --engines hf,vanilla,eagle --max_new_tokens 96"
    color = "always" if console.is_terminal else "auto"
    for title, command in (
        ("a training sample: supervised tokens are coloured", words(look, color=color)),
        ("train a draft head on fill-in-the-middle data", words(train, output=head)),
        (
            "the shipped head: stock generate, the plain engine, eagenerate",
            words(measure, num_prompts=num_prompts, json=bench),
        ),
    ):
        console.rule(title)
        console.print(f"$ python -m {' '.join(command)}\n", style="bold", markup=False)
        if code := call(command):
            return code

    console.rule("what happened")
    summary, result = json.loads((head / "summary.json").read_text()), json.loads(bench.read_text())
    eagle = next(r for r in result["runs"] if r["engine"] == "eagle")
    identical = all(result["identical"].values())
    console.print(
        f"your head, {summary['seconds'] / 60:.1f} minutes of training: acceptance length on "
        f"held-out files {summary['tau_before']:.2f} before, {summary['tau_after']:.2f} after\n"
        f"shipped head: tau {eagle['tau']:.2f}, {eagle['vs_hf']:.2f}x stock generate, "
        f"{eagle['vs_best_vanilla']:.2f}x the plain engine, identical output: "
        f"{'yes' if identical else 'NO'}\n\nall of it is in {folder}; try your head:\n"
        f'python -m inference.generate --head {head / "head"} --prompt "def main():"'
    )
    return 0 if identical else 1


if __name__ == "__main__":
    cli.main(demo, name="python -m examples.demo")
