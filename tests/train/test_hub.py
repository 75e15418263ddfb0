"""Hub ids wherever a base, a head or an adapter is asked for: from a real hub cache, without a
network.
"""

import json
import os
import re
import subprocess
import sys
import time
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
    """As the hub's own client lays a download out: blobs, snapshots of links to them, and a name
    for a snapshot.
    """
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
    """org/tiny (main, and another model with another tokenizer at `old`), tiny, org/head for both,
    org/lora.
    """
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
def online(hub, monkeypatch, tmp_path):
    """This process's hub client on that cache; nothing is asked of a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_api(online):
    model = EaModel.from_pretrained("org/tiny", "org/head", dtype="float32", device="cpu")
    ids = model.eagenerate([[5, 6, 7]], max_new_tokens=8)
    assert ids.tolist() == model.naivegenerate([[5, 6, 7]], max_new_tokens=8).tolist()
    assert model.target.identity["id"] == model.target.name == "org/tiny"
    assert model.tokenizer.model_max_length != 77
    for options in (
        {"base_model_path": "org/tiny@old"},
        {"base_model_path": "org/tiny", "revision": "old"},
    ):
        old = EaModel.from_pretrained(
            ea_model_path="org/head@old", dtype="float32", device="cpu", **options
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
        with pytest.raises(
            EagleError,
            match=f"no model folder '{name}', and the hub.*; give a folder with .*hf download",
        ):
            find_folder(name)
    for name in ("./none", "a/b/c", "/nowhere/at/all", "~/none"):
        with pytest.raises(
            EagleError, match="no head folder .*; give a folder with .*, or a hub id ORG/NAME"
        ):
            find_folder(name, "head")


def command(name):
    import inference.bench.engines
    import inference.convert
    import inference.evaluate
    import inference.generate
    import inference.inspect_head
    import train.doctor
    import train.inspect
    import train.main
    import train.prepare.__main__ as prepare

    return {
        "inspect": train.inspect.inspect,
        "doctor": train.doctor.doctor,
        "main": train.main.train,
        "features": prepare.features,
        "regenerate": prepare.regenerate,
        "generate": inference.generate.generate,
        "bench": inference.bench.engines.bench,
        "evaluate": inference.evaluate.generate,
        "convert": inference.convert.convert,
        "inspect_head": inference.inspect_head.inspect_head,
    }[name]


FIM = ["--data_format", "fim", "--data", "fim.jsonl"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "--base", "org/tiny@old", *FIM],
        ["doctor", "--base", "org/tiny@old", "--head", "org/head@old", *FIM, "data.max_length=96"],
        ["features", "--base", "org/tiny@old", *FIM, "--output", "features", "data.max_length=96"],
        [
            "regenerate",
            "--base",
            "org/tiny@old",
            *FIM,
            "--output",
            "a.jsonl",
            "--limit",
            "2",
            "--max_new_tokens",
            "4",
        ],
        [
            "generate",
            "--model",
            "org/tiny@old",
            "--head",
            "org/head@old",
            "--prompt",
            "def",
            "--max_new_tokens",
            "4",
        ],
        [
            "bench",
            "--base",
            "org/tiny@old",
            "--head",
            "org/head@old",
            "--prompts",
            "p.jsonl",
            "--num_prompts",
            "1",
            "--repeats",
            "1",
            "--max_new_tokens",
            "4",
            "--engines",
            "hf",
            "--json",
            "bench.json",
        ],
        [
            "evaluate",
            "--base",
            "org/tiny@old",
            "--head",
            "org/head@old",
            "--limit",
            "1",
            "--n_samples",
            "1",
            "--max_new_tokens",
            "4",
            "--temperature",
            "0",
        ],
        ["convert", "org/head@old", "vllm", "--to", "vllm", "--target", "org/tiny@old"],
        ["inspect_head", "org/head@old", "--base", "org/tiny@old"],
    ],
    ids=lambda words: words[0],
)
def test_the_commands(online, tmp_path, capsys, words):
    write_fim(tmp_path / "fim.jsonl", rows=12)
    (tmp_path / "p.jsonl").write_text('{"prompt": "def"}\n')
    with pytest.raises(SystemExit) as exit:
        cli.main(command(words[0]), words[1:])
    said = capsys.readouterr()
    if words[0] == "doctor":  # other findings of this machine do not matter here
        assert "org/tiny@old: llama" in said.out and "org/head@old: " in said.out
        return
    assert not exit.value.code, said.err
    if words[0] == "convert":  # engines know no ORG/NAME@REVISION
        config = json.loads((tmp_path / "vllm" / "config.json").read_text())
        assert config["speculators_config"]["verifier"]["name_or_path"] == "org/tiny"
    if words[0] == "inspect_head":
        assert "fits this target" in said.out
    if words[0] == "regenerate":
        assert json.loads((tmp_path / "a.card.json").read_text())["target"]["id"] == "org/tiny@old"


def run(hub, folder, *words, **environment):
    # a run in this process says that it is a rank, and a process started here would take itself for
    # it
    outside = {
        k: v for k, v in os.environ.items() if not re.fullmatch(r".*RANK|WORLD_SIZE|MASTER_.*", k)
    }
    env = {
        **outside,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "EAGLE_CACHE": str(folder / "cache"),
        **environment,
    }
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_training_and_fine_tuning(hub, tmp_path):
    write_fim(tmp_path / "fim.jsonl", rows=12)
    small = [
        "--base",
        "org/tiny@old",
        *FIM,
        "train.max_steps=1",
        "train.batch_size=2",
        "data.max_length=96",
    ]
    done = run(
        hub,
        tmp_path,
        "train.main",
        *small,
        "--init_head",
        "org/head@old",
        "--output",
        "run",
        "eval.num_prompts=0",
        "train.dtype=fp32",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "head" / "eagle.json").read_text())
    assert record["target"]["id"] == "org/tiny@old"
    done = run(
        hub,
        tmp_path,
        "train.finetune",
        "sft",
        *small,
        "--output",
        "sft",
        "model.quantization=none",
        "model.compute=fp32",
        "data.heldout_fraction=0.2",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "sft" / "adapter" / "eagle.json").read_text())
    assert record["base"]["id"] == "org/tiny@old"


@pytest.mark.parametrize(
    "words, environment",
    [
        (
            ["inference.generate", "--prompt", "x"],
            {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        ),
        (["train.main", "--output", "run"], {}),
    ],
    ids=["unreachable", "offline"],
)
def test_what_the_hub_does_not_give_is_one_line(hub, tmp_path, words, environment):
    started = time.monotonic()
    done = run(hub, tmp_path, *words, "--base", "org/none", **environment)
    assert done.returncode == 1 and time.monotonic() - started < 60  # most of it imports
    (line,) = done.stderr.splitlines()
    assert "'org/none'" in line and "hf download org/none --local-dir" in line
    assert not (tmp_path / "run").exists()
