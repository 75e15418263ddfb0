"""Hub ids wherever a base, a head or an adapter is asked for: from a real hub cache, offline."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_helpers import save_tiny_model, write_fim
from huggingface_hub import constants

from configs import cli
from eagle.checkpoint import save_head
from eagle.errors import EagleError
from eagle.heads.head import HeadConfig, make_head
from eagle.loading import find_adapter, find_folder
from eagle.model import EaModel
from eagle.target import Target

ROOT = Path(__file__).parents[2]


def publish(cache, name, folder, revision="main"):
    """As the hub's client lays a download out: blobs, snapshots of links to them, their names."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = f"{len(list(repository.glob('snapshots/*'))) + 1:040x}"
    snapshot = repository / "snapshots" / commit
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / revision).write_text(commit)
    return commit


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer_dir):
    """org/tiny (main, and another model and tokenizer at `old`), tiny, org/head for both, org/lora."""
    cache, work = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("work")
    for seed, revision in enumerate(("main", "old")):
        base, head = work / revision, work / f"head-{revision}"
        save_tiny_model(base, tokenizer_dir, seed=seed)
        if revision == "old":
            config = json.loads((base / "tokenizer_config.json").read_text())
            config["model_max_length"] = 77
            (base / "tokenizer_config.json").write_text(json.dumps(config))
        target = Target.from_pretrained(base, dtype="float32", device="cpu")
        torch.manual_seed(seed)
        made = make_head(HeadConfig.for_target(target.config, draft_vocab_size=64))
        made.set_draft_vocab(torch.arange(64))
        save_head(made, head, {"target": target.identity})
        publish(cache, "org/tiny", base, revision)
        publish(cache, "org/head", head, revision)
    publish(cache, "tiny", work / "main")
    lora = work / "lora"
    lora.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lora / name).write_text("{}")
    publish(cache, "org/lora", lora)
    return cache


@pytest.fixture
def online(hub, monkeypatch, tmp_path, own_cache):
    """This process's hub client on that cache; nothing is asked of a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_the_api(online):
    model = EaModel.from_pretrained("org/tiny", "org/head", dtype="float32", device="cpu")
    ids = model.eagenerate([[5, 6, 7]], max_new_tokens=8)
    assert ids.tolist() == model.naivegenerate([[5, 6, 7]], max_new_tokens=8).tolist()
    assert model.target.identity["id"] == model.target.name == "org/tiny"
    assert model.tokenizer.model_max_length != 77
    for base, options in (("org/tiny@old", {}), ("org/tiny", {"revision": "old"})):
        old = EaModel.from_pretrained(
            base, "org/head@old", dtype="float32", device="cpu", **options
        )
        assert old.target.identity["id"] == "org/tiny@old"
        assert old.target.identity["fingerprint"] != model.target.identity["fingerprint"]
        assert old.tokenizer.model_max_length == 77
    assert Target.from_pretrained("tiny").name == "tiny"  # of the hub's first days, without ORG


def test_a_folder_is_a_folder_and_everything_else_is_an_id(online, tmp_path):
    assert find_folder("org/tiny").parent.parent.name == "models--org--tiny"
    assert find_folder("org/tiny@old") != find_folder("org/tiny")
    assert find_folder("org/tiny", revision="old") == find_folder("org/tiny@old")
    assert find_adapter("org/lora") == find_folder("org/lora", "adapter")
    for name in ("org/tiny", "org/tiny@old"):
        (tmp_path / name).mkdir(parents=True)
        assert find_folder(name).samefile(tmp_path / name)
    for name in ("org/none", "org/tiny@none", "none"):
        said = f"no model folder '{name}', and the hub.*; give a folder with .*hf download"
        with pytest.raises(EagleError, match=said):
            find_folder(name)
    for name in ("./none", "a/b/c", "/nowhere/at/all", "~/none"):
        said = "no head folder .*; give a folder with .*, or a hub id ORG/NAME"
        with pytest.raises(EagleError, match=said):
            find_folder(name, "head")


FIM = "--data_format fim --data fim.jsonl data.max_length=96"
SMALL = "--output run train.max_steps=1 train.batch_size=2"
COMMANDS = f"""
train.inspect:inspect --base org/tiny@old {FIM}
train.doctor:doctor --base org/tiny@old --head org/head@old {FIM}
train.prepare.__main__:features --base org/tiny@old {FIM} --output features
train.prepare.__main__:regenerate --base org/tiny@old {FIM} --output a.jsonl --limit 2 --max_new_tokens 4
inference.generate:generate --model org/tiny@old --head org/head@old --prompt def --max_new_tokens 4
inference.bench.engines:bench --base org/tiny@old --head org/head@old --prompts p.jsonl --num_prompts 1
 --repeats 1 --max_new_tokens 4 --engines hf --json bench.json
inference.evaluate:generate --base org/tiny@old --head org/head@old --limit 1 --n_samples 1
 --max_new_tokens 4 --temperature 0
inference.convert:convert org/head@old vllm --to vllm --target org/tiny@old
inference.inspect_head:inspect_head org/head@old --base org/tiny@old
train.main:train --base org/tiny@old --init_head org/head@old {FIM} {SMALL} train.dtype=fp32
 eval.num_prompts=0
train.finetune.__main__:sft --base org/tiny@old {FIM} {SMALL} model.quantization=none
 model.compute=fp32 data.heldout_fraction=0.2
"""
RECORDS = {"train": ("head", "target"), "sft": ("adapter", "base")}


@pytest.mark.parametrize("line", COMMANDS.replace("\n ", " ").split("\n")[1:-1])
def test_the_commands(online, tmp_path, capsys, monkeypatch, line):
    monkeypatch.setattr("train.doctor_machine.deepspeed", lambda zero: [])
    write_fim(tmp_path / "fim.jsonl", rows=12)
    (tmp_path / "p.jsonl").write_text('{"prompt": "def"}\n')
    command, *words = line.split()
    module, name = command.split(":")
    found = importlib.import_module(module)
    with pytest.raises(SystemExit) as exit:
        cli.main(vars(found).get(name) or found.COMMANDS[name], words)
    said = capsys.readouterr()
    if name == "doctor":  # other findings of this machine do not matter here
        assert "org/tiny@old: llama" in said.out and "org/head@old: " in said.out
        return
    assert not exit.value.code, said.err
    if name == "convert":  # engines know no ORG/NAME@REVISION
        config = json.loads((tmp_path / "vllm" / "config.json").read_text())
        assert config["speculators_config"]["verifier"]["name_or_path"] == "org/tiny"
    if name == "inspect_head":
        assert "fits this target" in said.out
    if name == "regenerate":
        assert json.loads((tmp_path / "a.card.json").read_text())["target"]["id"] == "org/tiny@old"
    if name in RECORDS:
        folder, part = RECORDS[name]
        made = json.loads((tmp_path / "run" / folder / "eagle.json").read_text())
        assert made[part]["id"] == "org/tiny@old"


def test_what_the_hub_does_not_give_is_one_line(tmp_path):
    """In a process whose hub client reads these variables at its import."""
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    outside = {k: v for k, v in os.environ.items() if not k.endswith(("RANK", "WORLD_SIZE"))}
    command = [sys.executable, *"-m train.main --output run --base org/none".split()]
    options = {"env": outside | env, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=300, **options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "'org/none'" in line and "hf download org/none --local-dir" in line
    assert not (tmp_path / "run").exists()
