"""`make demo`: the main job on the embedded model, in a few minutes on two CPU cores.

Looks at a training sample, trains a draft head from scratch on fill-in-the-middle data, then
measures the shipped head against stock `generate`. Each step is a command that can be typed by
hand; it is shown first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from configs import cli


def demo(*, output: str = "runs/demo", minutes: float = 2.5, num_prompts: int = 8) -> int:
    """Inspect, train for `minutes`, benchmark. Everything goes to --output (a new numbered folder
    if taken).
    """
    from rich.console import Console

    console = Console()
    started = time.monotonic()
    folder = free_folder(Path(output))

    def run(title: str, *arguments: str) -> None:
        console.rule(title)
        shown = " ".join(("python", *arguments))
        console.print(f"$ {shown}\n", style="bold", markup=False, highlight=False, soft_wrap=True)
        code = subprocess.run([sys.executable, *arguments], check=False).returncode
        if code:
            raise SystemExit(code)

    color = "always" if console.is_terminal else "auto"
    run(
        "1. a training sample: supervised tokens are coloured",
        "-m",
        "train.inspect",
        "--data_format",
        "fim",
        "--num",
        "1",
        "--color",
        color,
    )
    run(
        "2. train a draft head from scratch on fill-in-the-middle data",
        "-m",
        "train.main",
        "--data_format",
        "fim",
        "--config",
        "demo",
        "--output",
        str(folder / "head"),
        f"train.time_budget_minutes={minutes}",
    )
    bench = folder / "bench.json"
    run(
        "3. the shipped head: stock generate, the plain engine, eagenerate",
        "-m",
        "inference.bench",
        "--engines",
        "hf,vanilla,eagle",
        "--num_prompts",
        str(num_prompts),
        "--max_new_tokens",
        "96",
        "--json",
        str(bench),
    )

    console.rule("what happened")
    summary = json.loads((folder / "head" / "summary.json").read_text())
    result = json.loads(bench.read_text())
    eagle = next(r for r in result["runs"] if r["engine"] == "eagle")
    size = str(eagle["batch_size"])
    console.print(
        f"your head, {summary['seconds'] / 60:.1f} minutes of training: acceptance length on held-out files "
        f"{summary['tau_before']:.2f} before, {summary['tau_after']:.2f} after\n"
        f"shipped head: tau {eagle['tau']:.2f}, {result['speedup']['vs_hf'][size]:.2f}x stock generate, "
        f"{result['speedup']['vs_vanilla'][size]:.2f}x the plain engine, "
        f"identical output: {'yes' if all(result['identical'].values()) else 'NO'}\n\n"
        f"head      {folder / 'head' / 'head'}\nmetrics   {folder / 'head' / 'metrics.jsonl'}\n"
        f"summary   {folder / 'head' / 'summary.json'}\nbenchmark {bench}\n\n"
        f'try it: python -m inference.generate --head {folder / "head" / "head"} --prompt "def main():"\n'
        f"{(time.monotonic() - started) / 60:.1f} minutes in all",
        highlight=False,
        soft_wrap=True,  # paths and commands stay whole, for copying
    )
    return 0 if all(result["identical"].values()) else 1


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that does not exist."""
    folder, number = wanted, 2
    while folder.exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


if __name__ == "__main__":
    cli.main(demo, name="python -m examples.demo")
