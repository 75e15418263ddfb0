"""Each finding of the doctor about an installation or a machine is met by what it is there to
find.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
from head_helpers import save_tiny_model, write_fim
from packaging.requirements import Requirement

from configs.schema import HeadTrainConfig
from eagle.errors import EagleError
from eagle.heads.head import HeadConfig
from train.checks import devices, installation, space
from train.checks.findings import Finding, guarded

ROOT = Path(__file__).parents[2]


def only(findings, level, text):
    """The one finding of `level` that says `text`."""
    found = [f for f in findings if f.level == level and text in f.text]
    assert len(found) == 1, [vars(f) for f in findings]
    return found[0]


def config(**sections):
    return HeadTrainConfig.model_validate(sections)


def test_every_finding_but_ok_names_a_remedy():
    with pytest.raises(AssertionError):
        Finding("warning", "x", "something is wrong")
    with pytest.raises(AssertionError):
        Finding("bad", "x", "something", "do it")


def test_a_broken_check_is_a_finding_and_the_others_go_on():
    def breaks():
        yield Finding("ok", "x", "one")
        raise ZeroDivisionError("by zero")

    def refuses():
        raise EagleError("no such thing; make one")

    first, second = guarded("x", breaks)
    assert (first.level, second.level) == (
        "ok",
        "problem",
    ) and "ZeroDivisionError: by zero" in second.text
    [found] = guarded("x", refuses)
    assert (found.text, found.remedy) == ("no such thing", "make one")


# versions and names


@pytest.mark.parametrize(
    ("version", "level", "text"),
    [
        ("2.4.1", "problem", "older"),
        ("2.13.0+cu130", "ok", "torch 2.13.0+cu130"),
        ("2.9.0rc1", "problem", "older"),
        ("3.0", "warning", "newer"),
        (None, "problem", "not installed"),
    ],
)
def test_versions_are_held_against_the_supported_range(monkeypatch, version, level, text):
    monkeypatch.setattr(installation, "installed", lambda name: version)
    found = installation.judge(Requirement("torch>=2.9,<2.14"))
    assert found.level == level and text in found.text
    assert level == "ok" or found.remedy == "pip install 'torch<2.14,>=2.9'"


def test_this_installation_is_in_range_and_extras_are_told(monkeypatch):
    found = list(installation.versions())
    assert not [f for f in found if f.level == "problem"]
    real = installation.installed
    monkeypatch.setattr(
        installation, "installed", lambda name: None if name == "wandb" else real(name)
    )
    told = only(installation.versions(), "note", "wandb: not installed")
    assert told.remedy == "if you want that, pip install 'eagle-heads[wandb]'"
    monkeypatch.setattr(
        installation, "installed", lambda name: "1.0" if name == "torch" else real(name)
    )
    only(installation.versions(), "problem", "torch 1.0 is older")


def test_an_untested_python_is_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert only(installation.versions(), "warning", "untested").remedy == "use Python 3.10 to 3.13"


def test_requirements_of_an_installed_copy_come_from_its_metadata(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    given = [
        "torch>=2.9",
        'triton>=3; platform_system == "Nowhere"',
        'peft>=0.18; extra == "finetune"',
    ]
    monkeypatch.setattr(installation.metadata, "requires", lambda name: given)
    extras = SimpleNamespace(get_all=lambda key: ["finetune", "plots"])
    monkeypatch.setattr(installation.metadata, "metadata", lambda name: extras)
    base, by_extra = installation.requirements()
    assert [r.name for r in base if installation.applies(r)] == ["torch"]
    assert {k: [r.name for r in v] for k, v in by_extra.items()} == {"finetune": ["peft"]}


def test_another_distribution_with_a_package_of_ours(monkeypatch):
    owners = {"eagle": ["eagle-heads", "eagle-llm"], "kernels": ["eagle-heads", "kernels"]}
    monkeypatch.setattr(installation.metadata, "packages_distributions", lambda: owners)
    found = list(installation.clashes())
    assert "pip uninstall eagle-llm" in only(found, "problem", "eagle-llm also installs").remedy
    only(found, "ok", "ours are found beside Hugging Face's")
    monkeypatch.setattr(installation.metadata, "packages_distributions", dict)
    assert [f.level for f in installation.clashes()] == ["ok"]


def test_imports_that_end_elsewhere(monkeypatch, tmp_path):
    find = installation.importlib.util.find_spec

    def elsewhere(name):
        if name == "configs":
            return SimpleNamespace(submodule_search_locations=[str(tmp_path / "configs")])
        return None if name == "kernels.tree_attention" else find(name)

    monkeypatch.setattr(installation.importlib.util, "find_spec", elsewhere)
    found = list(installation.clashes())
    only(found, "problem", f"'import configs' finds {tmp_path}")
    only(found, "problem", "our kernels cannot be imported")


def test_deepspeed_trains_a_step():
    found = list(installation.deepspeed(zero=2))
    only(found, "ok", "trains a step alone with ZeRO 2")
    only(found, "ok", "ops can be built here")


def test_a_deepspeed_that_does_not_work(monkeypatch, tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise ImportError('op_builder is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = only(installation.deepspeed(), "problem", "op_builder is broken")
    assert "train.checks.deepspeed_probe" in found.remedy
    monkeypatch.setattr(installation, "DEEPSPEED_SECONDS", 0.01)
    only(installation.deepspeed(), "problem", "took more than 0.01 s")
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert (
        only(installation.deepspeed(), "problem", "cannot be imported").remedy
        == "pip install deepspeed"
    )


# devices


def test_a_cpu_and_a_cpu_build_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_nvidia_driver", lambda: False)
    only(devices.accelerators(), "note", "no GPU")
    monkeypatch.setattr(devices, "fast_bf16", lambda device: False)
    assert "train.dtype=fp32" in only(devices.accelerators(), "note", "emulates bf16").remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    only(devices.accelerators(), "note", "GPUs are hidden")
    monkeypatch.setattr(devices, "_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    only(devices.accelerators(), "warning", "PyTorch is a CPU build")


@pytest.mark.parametrize(
    ("capability", "free", "archs", "level", "text"),
    [
        ((9, 0), 0.9, ["sm_80", "sm_90"], "ok", "sm_90"),
        ((8, 6), 0.9, ["sm_80"], "ok", "sm_86"),
        ((9, 0), 0.9, ["sm_90a"], "ok", "sm_90"),
        ((12, 0), 0.9, ["sm_80", "sm_90"], "problem", "no code for it"),
        ((9, 0), 0.2, ["sm_90"], "warning", "other processes"),
        ((7, 5), 0.9, ["sm_75"], "note", "no bf16"),
    ],
)
def test_gpus(monkeypatch, capability, free, archs, level, text):
    facts = SimpleNamespace(name="NVIDIA X", major=capability[0], minor=capability[1])
    total = 80 * 2**30
    fakes = {
        "is_available": lambda: True,
        "get_arch_list": lambda: archs,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: facts,
        "mem_get_info": lambda index: (int(free * total), total),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    only(devices.accelerators(), level, text)


def test_attention_back_ends(monkeypatch):
    assert "math" in devices.sdpa_kinds(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_version", lambda name: None)
    only(devices.attention(), "ok", "flash-attention is not installed")
    monkeypatch.setattr(devices, "_version", lambda name: "2.8.3" if name == "flash-attn" else None)
    only(devices.attention(), "warning", "flash-attention 2 (2.8.3) cannot be imported")
    monkeypatch.setattr(devices, "_import_error", lambda module: None)
    only(devices.attention(), "note", "does not run on a CPU")
    monkeypatch.setattr(devices, "sdpa_kinds", lambda device: [])
    only(devices.attention(), "problem", "no attention of PyTorch runs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    only(devices.attention(), "ok", "flash-attention 2 (2.8.3) can be imported")
    monkeypatch.setattr(devices, "_version", lambda name: None)
    only(devices.attention(), "note", "flash-attention 2 or 3 or 4 would run here")


def test_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_version", lambda name: "3.9.0")
    monkeypatch.setattr(devices, "_import_error", lambda module: None)
    only(devices.triton(), "ok", "here the references run")
    monkeypatch.setattr(devices, "_import_error", lambda module: "OSError: libfoo")
    only(devices.triton(), "note", "cannot be imported: OSError: libfoo")
    monkeypatch.setattr(devices, "_version", lambda name: None)
    only(devices.triton(), "ok", "a CPU does not need it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    only(devices.triton(), "warning", "triton is not installed")
    monkeypatch.setattr(devices, "_version", lambda name: "3.9.0")
    only(devices.triton(), "warning", "cannot be imported")
    monkeypatch.setattr(devices, "_import_error", lambda module: None)
    monkeypatch.setenv("EAGLE_TRITON", "0")
    only(devices.triton(), "note", "EAGLE_TRITON=0")


def test_the_compiler(monkeypatch, tmp_path):
    only(devices.compiler(), "ok", "compiles C++20")
    broken = tmp_path / "old-g++"
    broken.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    only(devices.compiler(), "warning", "unrecognized option -std=c++20")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "apt-get install g++" in only(devices.compiler(), "warning", "no C++ compiler").remedy
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    only(devices.compiler(), "warning", "ninja does not run")


# memory and disk

HEAD = HeadConfig(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=600,
    draft_vocab_size=300,
    target_hidden_size=64,
    feature_layers=(1, 2, 3),
)


def disk_of(monkeypatch, free):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.mark.parametrize(
    ("free", "level"), [(2**29, "problem"), (3 * 2**30, "warning"), (2**40, "ok")]
)
def test_free_disk(monkeypatch, tmp_path, free, level):
    cfg = config(
        data={"cache_dir": str(tmp_path / "cache")}, train={"output": str(tmp_path / "a" / "b")}
    )
    disk_of(monkeypatch, free)
    found = list(space.disk(cfg))
    assert [f.level for f in found] == [level] * 2 and str(tmp_path / "cache") in found[0].text


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    only(space.disk(config(train={"output": str(file / "run")})), "problem", "cannot be written")
    monkeypatch.setattr(space.os, "access", lambda path, mode: False)
    only(
        space.disk(config(data={"cache_dir": str(tmp_path)})),
        "problem",
        f"{tmp_path} cannot be written",
    )


def test_memory_need(monkeypatch):
    cfg = config(train={"batch_size": 4, "zero": 2}, data={"max_length": 128})
    need = space.MemoryNeed.of(
        cfg, HEAD, weights=1000, target_bytes=10**6, target_width=99, world=4
    )
    assert (need.target, need.head, need.optimizer) == (10**6, 8000, 2000)
    muon = config(
        train={"batch_size": 4, "optimizer": "muon", "checkpoint_activations": True},
        data={"max_length": 128},
    )
    less = space.MemoryNeed.of(muon, HEAD, weights=1000, target_bytes=10**6, target_width=99)
    assert less.optimizer == 4000 and less.activations < 0.25 * need.activations
    for free, level in (
        (need.total * 2, "ok"),
        (need.total * 1.1, "warning"),
        (need.total - 1, "problem"),
    ):
        monkeypatch.setattr(space, "available_memory", lambda device, free=free: int(free))
        [found] = space.memory(need, torch.device("cpu"))
        assert found.level == level
    assert "train.checkpoint_activations=true" in found.remedy


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(amp, recompute):
    from configs.schema import LossConfig
    from eagle.heads.head import Eagle3Head
    from train.head.ttt import UnrolledHead, plan_unroll

    def teacher(start, stop):
        return torch.randn(stop - start, HEAD.draft_vocab_size), torch.zeros(
            stop - start, dtype=torch.int64
        )

    head, steps, B, T = Eagle3Head(HEAD), 3, 2, 64
    module = UnrolledHead(head, steps, 0.8, LossConfig(), amp, recompute=recompute)
    plan = plan_unroll(torch.ones(B, T, dtype=torch.bool), steps)
    dtype = torch.bfloat16 if amp else torch.float32
    features, embeds = torch.randn(B * T, 192, dtype=dtype), torch.randn(B * T, 64, dtype=dtype)
    given = {x.untyped_storage().data_ptr() for x in (*module.parameters(), features, embeds)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(features, embeds, plan, teacher, plan.counts.float())
    cfg = config(
        train={
            "batch_size": B,
            "ttt_steps": steps,
            "dtype": "bf16" if amp else "fp32",
            "checkpoint_activations": recompute,
        },
        data={"max_length": T},
    )
    expected = space.MemoryNeed.of(cfg, HEAD, 1, 1, 1).activations
    # under amp a CPU also keeps fp32 copies of short rows for attention
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.3)


def test_disk_need(monkeypatch, tmp_path):
    cfg = config(train={"output": str(tmp_path), "save_total_limit": 3, "dtype": "bf16"})
    need = space.DiskNeed.of(cfg, weights=1000, tokens=10_000, target_hidden=64)
    assert need.checkpoint == 14_000 and need.checkpoints == 5 * 14_000
    assert need.tokens == 50_000 and need.features == 10_000 * (3 * 64 + 64) * 2
    disk_of(monkeypatch, 60_000)
    found = list(space.disk_need(need, cfg))
    only(found, "problem", "those that are kept 68.4 KiB")
    assert "online" in only(found, "note", "offline features would take about 4.9 MiB").remedy
    disk_of(monkeypatch, 40_000)
    only(space.disk_need(need, cfg), "problem", "tokenised data takes about 48.8 KiB")
    disk_of(monkeypatch, 2**40)
    assert {f.level for f in space.disk_need(need, cfg)} == {"ok"}


def test_available_memory_is_what_there_is():
    assert 2**28 < space.available_memory(torch.device("cpu")) < 2**50


# the command


def doctor(*arguments):
    return commands.run("train.doctor", *arguments)


@pytest.mark.slow
def test_the_command_on_a_fit_target_and_on_an_unfit_one(tmp_path, tokenizer_dir):
    base, data = tmp_path / "base", tmp_path / "fim.jsonl"
    save_tiny_model(base, tokenizer_dir)
    write_fim(data)
    done = doctor(
        "--base",
        base,
        "--data",
        data,
        "--data_format",
        "fim",
        "--json",
        tmp_path / "out.json",
        "--num",
        1,
        f"data.cache_dir={tmp_path}",
        f"train.output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("Installation", "Devices", "Disk", "Target", "Data", "Needs", "⟦", "0 problems"):
        assert part in done.stdout
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["counts"].get("problem", 0) == 0 and kept["seconds"] < 60
    assert all(bool(f["remedy"]) == (f["level"] != "ok") for f in kept["findings"])
    assert not (tmp_path / "run").exists()
    (base / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    done = doctor("--base", base, "--json", tmp_path / "out.json", "--color", "never")
    assert done.returncode == 1 and "recurrent state" in done.stdout
    counts = json.loads((tmp_path / "out.json").read_text())["counts"]
    assert counts["problem"] >= 1 and f"{counts['problem']} problem" in done.stdout
    assert "Data" not in done.stdout


def test_errors_of_the_command_are_one_line(tmp_path):
    for arguments, text in (
        (["--bass", "x"], "did you mean --base?"),
        (["--num", "-1"], "0 or more"),
        (["train.zreo=1"], "did you mean train.zero?"),
    ):
        done = doctor(*arguments)
        assert done.returncode == 1 and text in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"EAGLE_CACHE": "ours", "XDG_CACHE_HOME": "xdg"}, "ours"),
        ({"EAGLE_CACHE": "~/ours"}, "home/ours"),
        ({"EAGLE_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/eagle-heads"),
        ({}, "home/.cache/eagle-heads"),
    ],
)
def test_one_rule_for_all_caches(monkeypatch, tmp_path, environment, expected):
    from configs.schema import DataConfig
    from eagle.compile import compiled_folder
    from records.cache import cache_root

    for name in ("EAGLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **environment}.items():
        monkeypatch.setenv(
            name, value if value.startswith("~") or not value else str(tmp_path / value)
        )
    root = tmp_path / expected
    assert compiled_folder() == root / "compiled" and cache_root(DataConfig()) == root / "tokenised"
    assert root in space.folders(HeadTrainConfig()).values()
