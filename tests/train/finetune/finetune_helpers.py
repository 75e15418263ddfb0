"""Small configs, data and commands for the fine-tuning tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from configs.finetune_schema import DpoConfig, MultitaskConfig, SftConfig
from train.finetune.__main__ import run

ROOT = Path(__file__).parents[3]
ENV = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
}
WORDS = "def class return self value index for in range len list item key print open path".split()
CONFIGS = {"sft": SftConfig, "multitask": MultitaskConfig, "dpo": DpoConfig}

TASKS = [
    {
        "name": "answer",
        "type": "generation",
        "fields": ["text"],
        "label": "answer",
        "template": "Answer: {text}",
        "metric": "exact_match",
        "max_new_tokens": 4,
    },
    {
        "name": "kind",
        "type": "classification",
        "fields": ["text"],
        "label": "kind",
        "template": "Judge: {text}",
        "classes": ["a", "b", "c"],
        "metric": "accuracy",
        "weight": 2.0,
    },
    {
        "name": "score",
        "type": "regression",
        "fields": ["text"],
        "label": "score",
        "template": "Judge: {text}",
        "metric": "mae",
        "weight": 0.5,
    },
    {
        "name": "rank",
        "type": "ranking",
        "fields": ["text", "options"],
        "label": "order",
        "template": "Rank {options} for {text}",
        "metric": "ndcg",
    },
]


def text(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def instructions(path, rows=40, seed=0):
    rng = random.Random(seed)
    return write_lines(
        path,
        [
            {"instruction": f"say {text(rng, 4)}", "output": text(rng, rng.randint(2, 8))}
            for _ in range(rows)
        ],
    )


def task_records(rows=40, seed=0):
    """Records of every kind, with labels missing here and there."""
    rng = random.Random(seed)
    out = []
    for n in range(rows):
        record = {"text": text(rng, rng.randint(3, 9))}
        if n % 4 == 0:
            record |= {"answer": text(rng, 2)}
        elif n % 4 == 3:
            record |= {
                "options": [text(rng, 3) for _ in range(3)],
                "order": [2, 0, rng.randint(0, 1)],
            }
        else:
            record |= {
                "kind": rng.choice("abc") if n % 3 else None,
                "score": None if n % 5 == 0 else rng.random(),
            }
            if record["kind"] is None and record["score"] is None:
                record["score"] = 0.5
        out.append(record)
    return out


def config(method, base, data, output, /, **sections):
    """A small run; other sections as dicts: train={...}, data={...}, model={...}, lora={...}."""
    train = {
        "output": str(output),
        "max_steps": 4,
        "batch_size": 2,
        "grad_accum": 1,
        "log_every": 1,
        "save_every": 100,
        "lr": 1e-3,
        "warmup_ratio": 0.0,
    }
    values = {
        "model": {"base": None if base is None else str(base), **sections.pop("model", {})},
        "lora": {"r": 4, "dropout": 0.0, **sections.pop("lora", {})},
        "data": {"path": str(data) if data else None, "max_length": 96, **sections.pop("data", {})},
        "train": train | sections.pop("train", {}),
    }
    values["data"]["cache_dir"] = str(Path(output).parent / "cache")
    if method == "sft":
        values["data"] = {
            "format": "instruction",
            "heldout_fraction": 0.2,
            "min_supervised_tokens": 1,
            **values["data"],
        }
    if method == "multitask":
        values["tasks"] = sections.pop("tasks", TASKS)
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


RANKS = """
import json, sys
from train.finetune.__main__ import run
from finetune_helpers import CONFIGS
for line in open(sys.argv[1]):
    method, values = json.loads(line)
    assert run(method, CONFIGS[method].model_validate(values), quiet=True) == 0
"""


def run_ranks(configs, folder, ranks):
    """(method, config)s in `ranks` processes under torchrun; ranks=1 is one plain process."""
    # not on the path of the processes that import this file
    from engine_helpers import assert_quiet

    listed = folder / "configs.jsonl"
    listed.write_text(
        "".join(json.dumps([m, c.model_dump(mode="json")]) + "\n" for m, c in configs)
    )
    script = folder / "ranks.py"
    script.write_text(RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(script), str(listed)]
    env = {**ENV, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.returncode == 0, "\n".join(errors) + done.stderr[-3000:]
    assert_quiet(done)
