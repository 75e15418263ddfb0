"""A tiny target, tiny data and small configs for the head training tests."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from engine_helpers import BASE
from safetensors.torch import load_file

from configs.schema import HeadTrainConfig
from eagle.heads.head import HeadConfig, make_head

ROOT = Path(__file__).parents[2]
WORDS = "def class return self value index for in range len list item key print open path".split()


def save_tiny_model(folder, tokenizer_dir, seed=0, hidden=32):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"])
    torch.manual_seed(seed)
    sizes = dict(vocab_size=size + 16, hidden_size=hidden, intermediate_size=2 * hidden)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    other = dict(initializer_range=0.2, eos_token_id=0, pad_token_id=None)
    config = LlamaConfig(**BASE | sizes | heads | other)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        if file.is_file() and file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)


def write_fim(path, rows=80, seed=0):
    rng = random.Random(seed)

    def text(n):
        return " ".join(rng.choice(WORDS) for _ in range(n)) + "\n"

    def row():
        prefix, middle = text(rng.randint(2, 9)), text(rng.randint(2, 7))
        return json.dumps({"prefix": prefix, "middle": middle, "suffix": text(3)})

    path.write_text("".join(row() + "\n" for _ in range(rows)))


def config(base, data, output, **train):
    """A small run; sections other than train as dicts: loss=, eval=, model=, data_more=."""
    sections = {name: train.pop(name, {}) for name in ("loss", "eval", "model", "data_more")}
    rows = {"format": "fim", "path": str(data), "max_length": 96, "heldout_fraction": 0.1}
    rows |= {"cache_dir": str(data.parent / "cache"), **sections["data_more"]}
    small = {"max_steps": 4, "batch_size": 4, "dtype": "fp32", "ttt_steps": 3, "log_every": 1}
    model = {"base": str(base), "draft_vocab_size": 128, "dtype": "float32", **sections["model"]}
    few = {"num_prompts": 0, "max_new_tokens": 8, "tree": "8,3,2", **sections["eval"]}
    train = {"output": str(output), **small, **train}
    values = {"model": model, "data": rows, "train": train, "loss": sections["loss"], "eval": few}
    return HeadTrainConfig.model_validate(values)


def trained(base, data, output, **options):
    """The folder of a finished run of `config`."""
    from train.main import run

    assert run(config(base, data, output, **options), quiet=True) == 0
    return output


def run_python(*words, **environment):
    """`python WORDS` from the repository's root; it must succeed."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # a run in this process has made a rank of it
    outside = {k: v for k, v in os.environ.items() if not re.search("RANK|WORLD_SIZE|MASTER_", k)}
    options = {"env": {**outside, **ours, **environment}, "cwd": ROOT, "timeout": 400}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def require_same_tensors(a, b):
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    assert not [k for k in left if not torch.equal(left[k], right[k])]


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output):
    return [row["loss"] for row in rows_of(output)]


def tiny_head(hidden=32, vocab=60, draft=24, heads=4, kv=2, seed=0, **options):
    torch.manual_seed(seed)
    c = HeadConfig(
        hidden_size=hidden,
        intermediate_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=8,
        vocab_size=vocab,
        draft_vocab_size=draft,
        target_hidden_size=hidden,
        feature_layers=(-1,) if options.get("method") == "eagle1" else (1, 2, 3),
        **options,
    )
    head = make_head(c)
    head.set_draft_vocab(torch.randperm(vocab)[:draft])
    return head


def mask_of(width, *spans):
    """[rows, width] bool, True from start to stop in each row."""
    places = torch.arange(width)
    return torch.stack([(places >= start) & (places < stop) for start, stop in spans])


def drafts_of(head_folder, base):
    """What a saved head drafts in the engine: tokens of three prompts, and how many accepted."""
    from eagle.checkpoint import load_head
    from eagle.model import EaModel
    from eagle.target import Target

    target = Target.from_pretrained(base, dtype="float32")
    head, _ = load_head(head_folder, target, dtype="float32")
    model = EaModel(target, head=head, tree="8,3,2")
    rows = model.generate([[5, 6, 7, 8], [9, 10, 11], [40, 41]], max_new_tokens=24).rows
    return [row.tokens for row in rows], [row.accepted for row in rows]
