"""`python -m examples.ablation`: heads that differ in one thing, trained on one budget, compared by
acceptance.

All arms share seed, steps, batch size, recipe and held-out prompts. The arms over the mixed data
read its features from the disk (equal to computing them, see train/head/features.py); the others
run the target.

    DIR/plan.json  data/  features/  runs/ARM-SEED/  arms/ARM-SEED.json  ablation.json  ablation.md
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.cli import main
from configs.errors import ConfigError
from configs.schema import HeadTrainConfig
from eagle.checkpoint import atomic_write_text, load_head, target_fingerprint
from eagle.errors import EagleError
from examples.ablation_table import BASELINE, KINDS, TEMPERATURES, summarise, table, tau_of
from records import embedded_dir, shipped

FORMATS = ("fim", "chat", "instruction")
TREE = "16,4,4"
RECIPE = {
    "optimizer": "muon",
    "lr": 3e-3,
    "batch_size": 8,
    "ttt_steps": 4,
    "save_every": 10**6,
    "report_to": "none",
}
MAX_LENGTH = 256
OWN_TOKENS = 96  # an answer of the target's own may have
MAX_BAD = 0.5  # of shipped rows may not fit in MAX_LENGTH with another tokenizer
CALIBRATION = 6  # steps


@dataclass(frozen=True)
class Arm:
    """What differs from the baseline. rows: mixed, fim, chat, or own (mixed, answered by the
    target).
    """

    name: str
    group: str
    loss: dict = field(default_factory=dict)
    rows: str = "mixed"


def _focal(gamma: int, weight: str) -> Arm:
    loss = {"name": "focal", "gamma": gamma, "weight": weight}
    return Arm(f"focal_{gamma}_{weight}", "loss", loss)


ARMS = (
    Arm(BASELINE, "loss"),
    *(Arm(name, "loss", {"name": name}) for name in ("kl", "reverse_kl", "overlap")),
    *(_focal(gamma, weight) for gamma in (1, 2) for weight in ("overlap", "target_prob")),
    Arm("on_policy", "answers", rows="own"),
    Arm("fim_only", "data", rows="fim"),
    Arm("chat_only", "data", rows="chat"),
)


def ablation(
    *,
    output: str,
    steps: int | None = None,
    minutes: float | None = None,
    seeds: int = 1,
    arms: str | None = None,
    prompts: int = 10,
    new_tokens: int = 64,
    base: str | None = None,
) -> int:
    """Train one head for each loss, kind of answers and data mixture, and measure acceptance
    length.

    --output DIR; the same command goes on with it: an arm that is done is not done again. The
    budget of an arm is --steps, or --minutes of training, measured once on this machine and turned
    into steps. --seeds N repeats every arm with N seeds. --arms a,b takes some of: soft_ce (the
    baseline), kl, reverse_kl, overlap, focal_1_overlap, focal_1_target_prob, focal_2_overlap,
    focal_2_target_prob, on_policy, fim_only, chat_only. --prompts of each kind (code, fim,
    instruction, chat; held out), continued by --new_tokens at temperatures 0 and 0.8. --base is
    another target than the embedded one.
    """
    if (steps is None) == (minutes is None):
        raise ConfigError("give the budget of an arm: --steps N or --minutes M")
    for name, value in (
        ("steps", steps),
        ("minutes", minutes),
        ("seeds", seeds),
        ("prompts", prompts),
        ("new_tokens", new_tokens),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"--{name}={value}: must be above 0")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    study = Study(Path(output).expanduser(), base, choose_arms(arms))
    asked = {"steps": steps, "minutes": minutes, "prompts": prompts, "new_tokens": new_tokens}
    return study.run(asked, seeds)


def choose_arms(names: str | None) -> list[Arm]:
    if names is None:
        return list(ARMS)
    known = {arm.name: arm for arm in ARMS}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"--arms {names}: unknown {', '.join(unknown)}; use some of {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]


class Study:
    """One folder: its plan, its data, and the arms that are done."""

    def __init__(self, folder: Path, base: str | None, arms: list[Arm]) -> None:
        from eagle.target import Target

        self.folder, self.base, self.arms = folder, base, arms
        self.target = Target.from_pretrained(base)
        self.fingerprint = target_fingerprint(self.target.model)

    def run(self, asked: dict, seeds: int) -> int:
        self.plan = self._agree(asked)
        work = list(itertools.product(range(seeds), self.arms))
        todo = [(seed, arm) for seed, arm in work if not self.result_path(arm, seed).exists()]
        self._prepare({arm.rows for _, arm in todo})
        started = time.monotonic()
        for place, (seed, arm) in enumerate(todo):
            left = (time.monotonic() - started) / place * (len(todo) - place) if place else None
            eta = f", about {left / 60:.0f} min left" if left is not None else ""
            note(
                f"arm {len(work) - len(todo) + place + 1}/{len(work)}: {arm.name}, seed {seed}, "
                f"{self.plan['steps']} steps{eta}"
            )
            code = self._train(arm, seed)
            if code:
                return code
        results = [json.loads(self.result_path(arm, seed).read_text("utf-8")) for seed, arm in work]
        summary = {
            **self.plan,
            "seeds": seeds,
            "environment": environment(),
            "arms": summarise(results),
            "results": results,
        }
        atomic_write_text(self.folder / "ablation.json", json.dumps(summary, indent=1) + "\n")
        atomic_write_text(self.folder / "ablation.md", table(summary))
        print((self.folder / "ablation.md").read_text("utf-8"))
        return 0

    def result_path(self, arm: Arm, seed: int) -> Path:
        return self.folder / "arms" / f"{arm.name}-{seed}.json"

    def _agree(self, asked: dict) -> dict:
        """plan.json: written at the first start, and what every later start must agree with."""
        path = self.folder / "plan.json"
        fixed = {
            "target": self.target.name,
            "fingerprint": self.fingerprint,
            "asked": asked,
            "recipe": RECIPE,
            "max_length": MAX_LENGTH,
            "tree": TREE,
            "own_tokens": OWN_TOKENS,
        }
        if path.exists():
            plan = json.loads(path.read_text("utf-8"))
            differs = [k for k in fixed if plan.get(k) != json.loads(json.dumps(fixed[k]))]
            if differs:
                key = differs[0]
                raise EagleError(
                    f"{self.folder} holds an ablation with {key}={plan.get(key)}, this command has {fixed[key]}; "
                    "repeat that command, or choose another --output"
                )
            return plan
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = asked["steps"] or self._calibrate(asked["minutes"])
        plan = {**fixed, "steps": steps, "rows": steps * RECIPE["batch_size"]}
        atomic_write_text(path, json.dumps(plan, indent=1) + "\n")
        return plan

    def _calibrate(self, minutes: float) -> int:
        """Steps of the baseline that fit into `minutes`, the target's share left out."""
        run_folder, rows = self.folder / "calibration", self.folder / "calibration.jsonl"
        shutil.rmtree(run_folder, ignore_errors=True)
        cut_file(shipped("instruction"), rows, (CALIBRATION + 1) * RECIPE["batch_size"])
        data = {"format": "instruction", "path": str(rows)}
        code = self._run({}, data, run_folder, 0, CALIBRATION, quiet=True)
        if code:
            raise KeyboardInterrupt
        seconds = [json.loads(line)["seconds"] for line in open(run_folder / "metrics.jsonl")][1:]
        step = float(np.median([sum(s.values()) - s["target"] for s in seconds]))
        shutil.rmtree(run_folder)
        rows.unlink()
        return max(round(minutes * 60 / step), 1)

    # data

    def _prepare(self, kinds: set[str]) -> None:
        """The files that the arms to come read, and the features of the mixed rows."""
        rows = self.plan["rows"]
        share = -(-rows // len(FORMATS))
        for name in FORMATS:
            cut_file(shipped(name), self.rows_path("mixed", name), share)
            if name in kinds:
                cut_file(shipped(name), self.rows_path(name, name), rows)
        if "own" in kinds:
            for name in FORMATS:
                self._answer(name)
        if "mixed" in kinds:
            from train.prepare.features import write_features

            cfg = self._config({}, self._data("mixed"), None, 0, 1)
            command = f"python -m examples.ablation (the same command; delete {self.folder / 'features'} first)"
            write_features(cfg, self.folder / "features", command)

    def rows_path(self, kind: str, name: str) -> Path:
        return self.folder / "data" / kind / f"{name}.jsonl"

    def _answer(self, name: str) -> None:
        """The mixed rows of a format, answered by the target: half greedily, half at temperature
        0.8.
        """
        from configs.schema import DataConfig
        from train.prepare.answering import Sampling
        from train.prepare.regenerate import open_local, regenerate

        source = self.rows_path("mixed", name)
        cfg = DataConfig(format=name, path=str(source), max_length=MAX_LENGTH)
        sampling = Sampling(TEMPERATURES, max_new_tokens=OWN_TOKENS)
        parts = open_local(cfg, sampling, self.base, slots=32)
        note(f"answers of the target: {name}")
        regenerate([source], self.rows_path("own", name), *parts, sampling)

    def _data(self, kind: str) -> dict:
        if kind in FORMATS:
            return {"format": kind, "path": str(self.rows_path(kind, kind))}
        mixture = [{"format": name, "path": str(self.rows_path(kind, name))} for name in FORMATS]
        return {"format": "mixed", "mixture": mixture}

    # one arm

    def _config(
        self, loss: dict, data: dict, output: Path | None, seed: int, steps: int
    ) -> HeadTrainConfig:
        values = {
            "model": {"base": self.base},
            "data": {
                "max_length": MAX_LENGTH,
                "heldout_fraction": 0,
                "min_supervised_tokens": 1,
                "max_bad_fraction": MAX_BAD,
                **data,
            },
            "train": {
                **RECIPE,
                "max_steps": steps,
                "seed": seed,
                "log_every": 1,
                "resume": "auto",
                "output": str(output) if output else None,
            },
            "loss": loss,
            "eval": {"num_prompts": 0},
        }
        return HeadTrainConfig.model_validate(values)

    def _run(
        self, loss: dict, data: dict, output: Path, seed: int, steps: int, quiet: bool = False
    ) -> int:
        from train.main import run

        return run(self._config(loss, data, output, seed, steps), quiet=quiet)

    def _train(self, arm: Arm, seed: int) -> int:
        """Train, measure, and write the arm's result; a signal's exit code, else 0."""
        output, data = self.folder / "runs" / f"{arm.name}-{seed}", self._data(arm.rows)
        if arm.rows == "mixed":
            data["features"] = str(self.folder / "features")
        code = self._run(arm.loss, data, output, seed, self.plan["steps"])
        if code:
            return code
        summary = json.loads((output / "summary.json").read_text("utf-8"))
        final = summary["final"]
        result = {
            "arm": arm.name,
            "group": arm.group,
            "loss": arm.loss,
            "rows": arm.rows,
            "seed": seed,
            "answers": summary["data"]["answers"],
            "train_seconds": round(summary["seconds"], 1),
            "final": {k: final[k] for k in ("loss", "tau_simulated", "acceptance_by_depth")},
            "measured": self._measure(output / "head"),
        }
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        atomic_write_text(self.result_path(arm, seed), json.dumps(result, indent=1) + "\n")
        tau = tau_of(result["measured"], 0.0)
        note(f"{arm.name}: tau {tau:.3f} on {len(result['measured'])} held-out generations")
        return 0

    def _measure(self, folder: Path) -> list[dict]:
        """The engine on every held-out prompt and temperature: tokens gained and verifications of
        each.
        """
        from eagle.model import EaModel

        head, _ = load_head(folder, self.target, dtype=self.target.dtype, device=self.target.device)
        model = EaModel(self.target, head=head, tree=TREE)
        found, prompts = [], self._prompts()
        for temperature in TEMPERATURES:
            rows = model.generate_many(
                [ids for _, ids in prompts],
                slots=16,
                seed=0,
                temperature=temperature,
                max_new_tokens=self.plan["asked"]["new_tokens"],
            )
            for (kind, _), row in zip(prompts, rows, strict=True):
                if row.error is not None:
                    raise row.error
                found.append(
                    {
                        "kind": kind,
                        "temperature": temperature,
                        "gained": len(row.tokens) - 1,
                        "cycles": row.cycles,
                    }
                )
        return found

    def _prompts(self) -> list[tuple[str, list[int]]]:
        """(kind, token ids) of the shipped held-out prompts, as many of each kind as the plan
        says.
        """
        from configs.schema import DataConfig
        from records import load_tokenizer
        from train.prepare.records import Rewriter

        tokenizer = load_tokenizer(self.base)
        rewriters = {
            name: Rewriter(DataConfig(format=name, max_length=MAX_LENGTH), tokenizer)
            for name in FORMATS
        }
        found: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
        for line in (embedded_dir() / "data" / "prompts.jsonl").open(encoding="utf-8"):
            record = json.loads(line)
            if "prompt" in record:
                kind, ids = "code", tokenizer(record["prompt"], verbose=False).input_ids
            elif "prefix" in record:
                kind, record = "fim", {**record, "middle": "."}
            elif "instruction" in record:
                kind, record = "instruction", {**record, "output": "."}
            else:
                answer = {"role": "assistant", "content": "."}
                kind, record = "chat", {**record, "messages": [*record["messages"], answer]}
            if kind != "code":
                ids = last_prompt(rewriters[kind], record)
            if len(ids) + self.plan["asked"]["new_tokens"] <= self.target.max_positions:
                found[kind].append(ids)
        count = self.plan["asked"]["prompts"]
        return [(kind, ids) for kind in KINDS for ids in found[kind][:count]]


def last_prompt(rewriter, record: dict) -> list[int]:
    """What precedes the record's last answer, with the earlier ones as they are."""
    from train.prepare.records import Answer

    (task,) = rewriter.tasks(record)
    given = [m["content"] for m in record.get("messages", []) if m["role"] == "assistant"][:-1]
    for text in given:
        task.take(Answer(text))
    return task.next().ids


def cut_file(source: Path, path: Path, rows: int) -> None:
    """The first `rows` lines of `source`, or all."""
    with source.open("rb") as file:
        lines = b"".join(itertools.islice(file, rows))
    atomic_write_text(path, lines.decode())


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment() -> dict:
    import torch
    import transformers

    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main(ablation, name="python -m examples.ablation")
