"""`python -m examples.ablation`: heads that differ in one thing, trained on one budget, compared by
acceptance.

    DIR/data/  heads/ARM-SEED/head  measured/ARM-SEED-TEMPERATURE.jsonl  ablation.json  ablation.md
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from configs import cli
from configs.errors import ConfigError
from eagle.checkpoint import atomic_write_text
from examples.steps import Steps, words, write_once
from records import shipped
from records.prompts import HELDOUT_PROMPTS

FORMATS = ("fim", "chat", "instruction")
KINDS = ("code", "fim", "instruction", "chat")  # of held-out prompts, which take turns
TEMPERATURES = ("0", "0.8")
TREE, BATCH, BASELINE = "16,4,4", 8, "soft_ce"
CONFIG = Path(__file__).with_name("ablation.yaml")
# what differs: the rows that are read, and overrides
ARMS: dict[str, tuple[str, list[str]]] = {BASELINE: ("mixed", [])}
for _loss in ("kl", "reverse_kl", "overlap"):
    ARMS[_loss] = ("mixed", [f"loss.name={_loss}"])
for _gamma, _weight in itertools.product((1, 2), ("overlap", "target_prob")):
    _focal = ["loss.name=focal", f"loss.gamma={_gamma}", f"loss.weight={_weight}"]
    ARMS[f"focal_{_gamma}_{_weight}"] = ("mixed", _focal)
ARMS |= {"on_policy": ("own", []), "fim_only": ("fim", []), "chat_only": ("chat", [])}


def ablation(
    *,
    output: str,
    steps: int = 120,
    seeds: int = 1,
    arms: str | None = None,
    prompts: int = 10,
    new_tokens: int = 64,
    base: str | None = None,
) -> int:
    """Train one head for each loss, kind of answers and data mixture, and measure acceptance
    length.

    --output DIR; the same command goes on with it: an arm that is done is not done again. --steps
    is the budget of an arm. --seeds N repeats every arm with N seeds. --arms a,b takes some of:
    soft_ce (the baseline), kl, reverse_kl, overlap, focal_1_overlap, focal_1_target_prob,
    focal_2_overlap, focal_2_target_prob, on_policy, fim_only, chat_only. --prompts of each kind
    (code, fim, instruction, chat; held out), continued by --new_tokens at temperatures 0 and 0.8.
    --base is another target than the embedded one.
    """
    asked = {"steps": steps, "seeds": seeds, "prompts": prompts, "new_tokens": new_tokens}
    for name, value in asked.items():
        if value <= 0:
            raise ConfigError(f"--{name}={value}: must be above 0")
    chosen = [name.strip() for name in arms.split(",")] if arms else list(ARMS)
    unknown = [name for name in chosen if name not in ARMS]
    if unknown:
        known = ", ".join(ARMS)
        raise ConfigError(f"--arms {arms}: unknown {', '.join(unknown)}; use some of {known}")
    folder = Path(output).expanduser()
    runner = Steps(folder)
    lines = HELDOUT_PROMPTS.read_text("utf-8").splitlines(keepends=True)
    heldout = write_once(folder / "data" / "prompts.jsonl", "".join(lines[: len(KINDS) * prompts]))
    data = {kind: rows_of(runner, kind, steps * BATCH, base) for kind, _ in map(ARMS.get, chosen)}
    results: dict[str, list[list[dict]]] = {name: [] for name in chosen}
    for seed, name in itertools.product(range(seeds), chosen):
        head = folder / "heads" / f"{name}-{seed}"
        kind, settings = ARMS[name]
        settings = [f"train.seed={seed}", f"train.max_steps={steps}", data[kind], *settings]
        command = words("train.main", *settings, base=base, output=head, config=CONFIG)
        runner.run(head.name, f"{name}, seed {seed}", command, head, resume=["--resume"])
        measured = []
        for temperature in TEMPERATURES:
            out = folder / "measured" / f"{head.name}-{temperature}.jsonl"
            command = words(
                f"inference.generate --seed 0 --batch_size 16 --tree {TREE}",
                base=base,
                head=head / "head",
                prompts=heldout,
                output=out,
                temperature=temperature,
                max_new_tokens=new_tokens,
            )
            runner.run(out.stem, f"{name} at temperature {temperature}", command, out)
            measured += read_measured(out, temperature)
        results[name].append(measured)
    summary = {"target": base or "embedded", **asked, "tree": TREE, "arms": summarise(results)}
    text = json.dumps({**summary, "measured": results}, indent=1)
    atomic_write_text(folder / "ablation.json", text + "\n")
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
            command = words(
                "train.prepare regenerate --temperature 0,0.8 --max_new_tokens 96 --slots 32",
                data_format=name,
                data=given,
                base=base,
                output=path,
                config=CONFIG,
            )
            runner.run(f"own-{name}", f"answers of the target: {name}", command, path, resume=[])
        sources.append(f"{{format: {name}, path: '{path}'}}")
    return f"data.mixture=[{', '.join(sources)}]"


def read_measured(path: Path, temperature: str) -> list[dict]:
    """Tokens gained and verifications (cycles) of each generation."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1]):
        row = json.loads(line)
        gained = row["new_tokens"] - 1
        cycles = round(gained / row["tau"]) if row["tau"] else 0
        kind = KINDS[number % len(KINDS)]
        rows.append({"kind": kind, "temperature": temperature, "gained": gained, "cycles": cycles})
    return rows


def sums(runs: list[list[dict]], temperature: str, kind: str | None = None) -> np.ndarray:
    """[prompts, 2]: tokens gained and cycles, all seeds together."""
    return np.sum(
        [
            [
                (m["gained"], m["cycles"])
                for m in run
                if m["temperature"] == temperature and kind in (None, m["kind"])
            ]
            for run in runs
        ],
        axis=0,
    )


def tau(gained_and_cycles: np.ndarray) -> np.ndarray:
    """[..., prompts, 2] -> [...]: tokens gained a verification, summed over prompts first."""
    total = gained_and_cycles.sum(-2)
    return total[..., 0] / np.maximum(total[..., 1], 1)


def summarise(results: dict[str, list[list[dict]]]) -> list[dict]:
    """One entry an arm: tau by temperature and kind, its deviation over seeds, and the difference
    to the baseline with a 95% interval from a paired bootstrap over prompts."""
    entries = []
    for name, runs in results.items():
        entry: dict = {"arm": name, "seeds": len(runs)}
        for temperature in TEMPERATURES:
            values = {"tau": float(tau(sums(runs, temperature)))}
            values |= {kind: float(tau(sums(runs, temperature, kind))) for kind in KINDS}
            if len(runs) > 1:
                each = [tau(sums([run], temperature)) for run in runs]
                values["spread"] = float(np.std(each, ddof=1))
            if BASELINE in results and name != BASELINE:
                values |= paired(sums(runs, temperature), sums(results[BASELINE], temperature))
            entry[f"temperature {temperature}"] = values
        entries.append(entry)
    return entries


def paired(ours: np.ndarray, theirs: np.ndarray, draws: int = 4000) -> dict[str, float]:
    """Difference in tau, and the 2.5% and 97.5% points of it when prompts are drawn again, each
    with what both arms did on it."""
    drawn = np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))
    low, high = np.percentile(tau(ours[drawn]) - tau(theirs[drawn]), [2.5, 97.5])
    return {"difference": float(tau(ours) - tau(theirs)), "low": float(low), "high": float(high)}


def table(summary: dict) -> str:
    """Markdown."""
    lines = [
        "# Ablation: losses, answers and data",
        "",
        f"Target {summary['target']}; {summary['steps']} steps of {BATCH} rows, "
        f"{summary['seeds']} seed(s), the same for all arms; acceptance length measured by the "
        f"engine, tree {TREE}, on {summary['prompts']} held-out prompts of each kind, "
        f"{summary['new_tokens']} new tokens. Intervals are over prompts only; ± is over seeds.",
    ]
    for temperature in TEMPERATURES:
        lines += [
            f"\n## Temperature {temperature}\n",
            f"| arm | τ | {' | '.join(KINDS)} | against {BASELINE} (95%) |",
            "|---|---|" + "---|" * (len(KINDS) + 1),
        ]
        for entry in summary["arms"]:
            values = entry[f"temperature {temperature}"]
            cells = [entry["arm"], *(f"{values[name]:.3f}" for name in ("tau", *KINDS)), ""]
            if "spread" in values:
                cells[1] += f" ± {values['spread']:.3f}"
            if "difference" in values:
                cells[-1] = "{difference:+.3f} ({low:+.3f} … {high:+.3f})".format(**values)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.main(ablation, name="python -m examples.ablation")
