"""`python -m examples.ablation`: heads that differ in one thing, trained on one budget, compared by
acceptance.

    DIR/data/  heads/ARM/head  measured/ARM-TEMPERATURE.jsonl  ablation.json  ablation.md
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from configs import cli
from configs.errors import ConfigError
from eagle.files import atomic_write_text
from examples.steps import Steps, words, write_once
from inference.bench.record import require
from inference.bench.report import bootstrap, grid
from records import shipped
from records.prompts import HELDOUT_PROMPTS

FORMATS = ("fim", "chat", "instruction")
KINDS = ("code", "fim", "instruction", "chat")  # of held-out prompts, which take turns
TEMPERATURES = ("0", "0.8")
TREE, BATCH = "16,4,4", 8
CONFIG = Path(__file__).with_name("ablation.yaml")
# what differs: the rows that are read, and overrides
ARMS = {"soft_ce": ("mixed", "")}
ARMS |= {loss: ("mixed", f"loss.name={loss}") for loss in ("kl", "reverse_kl", "overlap")}
ARMS |= {
    f"focal_{gamma}_{weight}": ("mixed", f"loss.name=focal loss.gamma={gamma} loss.weight={weight}")
    for gamma, weight in itertools.product((1, 2), ("overlap", "target_prob"))
}
ARMS |= {"on_policy": ("own", ""), "fim_only": ("fim", ""), "chat_only": ("chat", "")}


def ablation(
    *,
    output: str,
    steps: int = 120,
    arms: str | None = None,
    prompts: int = 10,
    new_tokens: int = 64,
    seed: int = 0,
    base: str | None = None,
) -> int:
    """Train a head for each loss, kind of answers and data mixture; measure acceptance length.

    --output DIR; the same command goes on with it: an arm that is done is not done again. --steps
    is the budget of an arm. --arms a,b takes some of: soft_ce (the baseline), kl, reverse_kl,
    overlap, focal_1_overlap, focal_1_target_prob, focal_2_overlap, focal_2_target_prob, on_policy,
    fim_only, chat_only. --prompts of each kind (code, fim, instruction, chat; held out), continued
    by --new_tokens at temperatures 0 and 0.8. --base is another target than the embedded one.
    """
    asked = {"steps": steps, "seed": seed, "prompts": prompts, "new_tokens": new_tokens}
    require(asked, "steps", "prompts", "new_tokens")
    chosen = {name.strip() for name in arms.split(",")} if arms else set(ARMS)
    if unknown := ", ".join(chosen - ARMS.keys()):
        raise ConfigError(f"--arms {arms}: unknown {unknown}; use some of {', '.join(ARMS)}")
    folder = Path(output).expanduser()
    runner = Steps(folder)
    lines = HELDOUT_PROMPTS.read_text("utf-8").splitlines(keepends=True)
    heldout = write_once(folder / "data" / "prompts.jsonl", "".join(lines[: len(KINDS) * prompts]))
    measure = {"base": base, "prompts": heldout, "max_new_tokens": new_tokens, "tree": TREE}
    found, baseline = {}, {}
    for name in filter(chosen.__contains__, ARMS):  # the baseline is the first
        kind, settings = ARMS[name]
        data = rows_of(runner, kind, steps * BATCH, base)
        head = folder / "heads" / name
        command = f"train.main train.seed={seed} train.max_steps={steps} {settings}"
        command = words(command, data, base=base, output=head, config=CONFIG)
        runner.run(name, command, head, resume=["--resume"])
        found[name] = {}
        for temperature in TEMPERATURES:
            out = folder / "measured" / f"{name}-{temperature}.jsonl"
            more = {**measure, "head": head / "head", "output": out, "temperature": temperature}
            runner.run(out.stem, words("inference.generate --seed 0 --batch_size 16", **more), out)
            rows = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
            gained = [(row["new_tokens"] - 1, row["tau"]) for row in rows]
            ours = np.array([(n, round(n / tau) if tau else 0) for n, tau in gained])
            found[name][temperature] = summarise(ours, baseline.setdefault(temperature, ours))
    summary = {"target": base or "embedded", **asked, "tree": TREE, "arms": found}
    atomic_write_text(folder / "ablation.json", json.dumps(summary, indent=1) + "\n")
    atomic_write_text(folder / "ablation.md", table(summary))
    print(table(summary))
    return 0


def rows_of(runner: Steps, kind: str, count: int, base: str | None) -> str:
    """The override that names `count` shipped rows: of one format, mixed, or mixed and answered by
    the target."""
    formats = FORMATS if kind in ("mixed", "own") else (kind,)
    sources = []
    for name in formats:
        lines = shipped(name).read_text("utf-8").splitlines(keepends=True)
        path = runner.folder / "data" / f"{name}-{len(formats)}.jsonl"
        write_once(path, "".join(lines[: -(-count // len(formats))]))
        if kind == "own":
            given, path = path, runner.folder / "own" / f"{name}.jsonl"
            command = "train.prepare regenerate --temperature 0,0.8 --max_new_tokens 96 --slots 32"
            more = {"data_format": name, "data": given, "base": base, "output": path}
            runner.run(f"own-{name}", words(command, **more, config=CONFIG), path, resume=[])
        sources.append(f"{{format: {name}, path: '{path}'}}")
    return f"data.mixture=[{', '.join(sources)}]"


def tau(gained_and_cycles: np.ndarray) -> float:
    """[prompts, 2], tokens gained and verifications of each generation -> their ratio, in sum."""
    gained, cycles = gained_and_cycles.sum(0)
    return float(gained / max(cycles, 1))


def summarise(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """tau in all and by kind of prompt; the difference to the baseline's, and its 2.5% and 97.5%
    points when prompts are drawn again, each with what both arms did on it."""
    values = {"tau": tau(ours)}
    values |= {kind: tau(ours[n :: len(KINDS)]) for n, kind in enumerate(KINDS)}
    low, high = bootstrap(lambda drawn: tau(ours[drawn]) - tau(theirs[drawn]), len(ours))
    return {**values, "difference": tau(ours) - tau(theirs), "low": low, "high": high}


def table(summary: dict) -> str:
    parts = [
        "# Ablation: losses, answers and data",
        "Target {target}; {steps} steps of {batch} rows, seed {seed}; acceptance length of the "
        "engine, tree {tree}, on {prompts} held-out prompts of each kind, {new_tokens} new tokens; "
        "intervals are over prompts only.".format(batch=BATCH, **summary),
    ]
    for temperature in TEMPERATURES:
        lines = [["arm", "τ", *KINDS, f"against {next(iter(summary['arms']))} (95%)"]]
        for name, of in summary["arms"].items():
            cells = [f"{of[temperature][column]:.3f}" for column in ("tau", *KINDS)]
            against = "{difference:+.3f} ({low:+.3f} … {high:+.3f})".format(**of[temperature])
            lines.append([name, *cells, against])
        parts += [f"## Temperature {temperature}", grid(lines)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    cli.main(ablation, name="python -m examples.ablation")
