"""Small configs, data and commands for the fine-tuning tests."""

import json
import random
from pathlib import Path

import torch
from head_helpers import WORDS
from safetensors.torch import load_file

from configs.finetune_schema import DpoConfig, MultitaskConfig, SftConfig
from eagle.checkpoint import target_fingerprint
from eagle.loading import WEIGHTS
from train.finetune.__main__ import run
from train.finetune.policy import read_checkpoint

CONFIGS = {"sft": SftConfig, "multitask": MultitaskConfig, "dpo": DpoConfig}
SIX = {
    "train": {"max_steps": 6, "save_every": 2, "save_total_limit": 9, "grad_accum": 2, "lr": 1e-2},
    "lora": {"dropout": 0.1},
}
QUICK = {"max_steps": 6, "grad_clip": 1.0, "log_every": 7, "gradient_checkpointing": False}


def task(name, type, label, template, metric, **more):
    given = {"name": name, "type": type, "fields": ["text"], "label": label, "template": template}
    return {**given, "metric": metric, **more}


CLASSES, BOTH = ["a", "b", "c"], ["text", "options"]
TASKS = [
    task("answer", "generation", "answer", "Answer: {text}", "exact_match", max_new_tokens=4),
    task("kind", "classification", "kind", "Judge: {text}", "accuracy", classes=CLASSES, weight=2),
    task("score", "regression", "score", "Judge: {text}", "mae", weight=0.5),
    task("rank", "ranking", "order", "Rank {options} for {text}", "ndcg", fields=BOTH),
]


def text(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def instructions(path, rows=40):
    rng = random.Random(0)
    turns = ((f"say {text(rng, 4)}", text(rng, rng.randint(2, 8))) for _ in range(rows))
    return write_lines(path, [{"instruction": a, "output": b} for a, b in turns])


def task_records(rows=40):
    """Records of every kind, with labels missing here and there."""
    rng, out = random.Random(0), []
    for n in range(rows):
        record = {"text": text(rng, rng.randint(3, 9))}
        if n % 4 == 0:
            record |= {"answer": text(rng, 2)}
        elif n % 4 == 3:
            options, order = [text(rng, 3) for _ in range(3)], [2, 0, rng.randint(0, 1)]
            record |= {"options": options, "order": order}
        else:
            record["kind"] = rng.choice("abc") if n % 3 else None
            record["score"] = None if n % 5 == 0 and n % 3 else rng.random()
        out.append(record)
    return out


def config(method, base, data, output, /, **sections):
    """A small run; other sections as dicts: train={...}, data={...}, model={...}, lora={...}."""
    train = {"output": str(output), "max_steps": 4, "batch_size": 2, "grad_accum": 1}
    train |= {"log_every": 1, "save_every": 100, "lr": 1e-3, "warmup_ratio": 0.0}
    files = {"path": str(data) if data else None, "max_length": 96}
    files["cache_dir"] = str(Path(output).parent / "cache")
    if method == "sft":
        files |= {"format": "instruction", "heldout_fraction": 0.2, "min_supervised_tokens": 1}
    values = {
        "model": {"base": None if base is None else str(base)},
        "lora": {"r": 4, "dropout": 0.0},
        "data": files,
        "train": train,
    }
    values = {name: value | sections.pop(name, {}) for name, value in values.items()}
    if method == "multitask":
        values["tasks"] = TASKS
    return CONFIGS[method].model_validate(values | sections)


def go(method, *args, **sections):
    """Run it here; the output folder."""
    cfg = config(method, *args, **sections)
    assert run(method, cfg, quiet=True) == 0
    return Path(cfg.train.output)


def rows_of(output, evaluations=False):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if ("eval_loss" in row) == evaluations]


def losses_of(output):
    return [row["loss"] for row in rows_of(output)]


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def fingerprint_of(base):
    return target_fingerprint(read_checkpoint(str(base)))


def same(a, b, name=WEIGHTS):
    """Do two adapter folders hold the same bits?"""
    a, b = load_file(a / name), load_file(b / name)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
