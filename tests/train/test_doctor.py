"""Each finding of the doctor is met by what it is there to find."""

import json
from types import SimpleNamespace

import pytest
import torch
from data_helpers import chat, write_jsonl
from head_helpers import save_tiny_model, tiny_head
from transformers import AutoTokenizer

from configs.schema import DataConfig, HeadTrainConfig, LossConfig
from eagle.checkpoint import save_head
from eagle.errors import EagleError
from eagle.loading import compiled_folder
from records.cache import cache_root
from train import doctor_machine as doctor
from train import doctor_target
from train.doctor import doctor as command
from train.doctor_machine import Finding, guarded
from train.head.ttt import UnrolledHead, plan_unroll

CPU = torch.device("cpu")

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
REWRITING = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}<|im_end|>\n{% endfor %}"
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def only(findings, level, text):
    """The one finding of `level` that says `text`."""
    found = [f for f in findings if f.level == level and text in f.text]
    assert len(found) == 1, findings
    return found[0]


def config(base=None, **sections):
    model = {"base": base and str(base), "dtype": "float32", **sections.pop("model", {})}
    return HeadTrainConfig.model_validate({"model": model, **sections})


def test_every_finding_but_ok_names_a_remedy_and_a_broken_check_is_one():
    with pytest.raises(AssertionError):
        Finding("warning", "x", "something is wrong")

    def breaks():
        yield Finding("ok", "x", "one")
        raise ZeroDivisionError("by zero")

    def refuses():
        raise EagleError("no such thing; make one")

    first, second = guarded("x", breaks)
    assert (first.level, second.level) == ("ok", "problem")
    assert "ZeroDivisionError: by zero" in second.text
    [found] = guarded("x", refuses)
    assert (found.text, found.remedy) == ("no such thing", "make one")


# the installation


def test_versions_are_held_against_the_supported_range(monkeypatch):
    needs = ["torch>=2.9,<2.14", 'triton>=3; platform_system == "No"', 'peft>=1; extra == "x"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    found = {"peft": "0.1"}
    monkeypatch.setattr(doctor, "version", found.get)
    for version, level, text in (
        ("2.4.1", "problem", "torch 2.4.1 is older"),
        ("2.9.0rc1", "problem", "torch 2.9.0rc1 is older"),
        ("2.13.0+cu130", "ok", "torch 2.13.0+cu130"),
        ("3.0", "warning", "newer"),
        (None, "problem", "not installed"),
    ):
        found["torch"] = version
        told = only(doctor.versions(), level, text)
        assert level == "ok" or told.remedy == "pip install 'torch<2.14,>=2.9'"
        only(doctor.versions(), "problem", "peft 0.1 is older")
    monkeypatch.undo()
    assert not [f for f in doctor.versions() if f.level == "problem"]


def test_names_that_others_have_too(monkeypatch):
    owners = {"eagle": ["eagle-heads", "eagle-llm"], "kernels": ["eagle-heads", "kernels"]}
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: owners)
    found = list(doctor.clashes())
    assert "pip uninstall eagle-llm" in only(found, "problem", "eagle-llm also installs").remedy
    only(found, "ok", "our kernels are found")
    monkeypatch.setattr(doctor.metadata, "packages_distributions", dict)
    assert [f.level for f in doctor.clashes()] == ["ok"]
    find = doctor.importlib.util.find_spec
    hidden = lambda name: None if name == "kernels.tree_attention" else find(name)  # noqa: E731
    monkeypatch.setattr(doctor.importlib.util, "find_spec", hidden)
    only(doctor.clashes(), "problem", "another package 'kernels' hides ours")


def test_deepspeed_trains_a_step_or_says_why_not(monkeypatch):
    only(doctor.deepspeed(zero=2), "ok", "trains a step alone with ZeRO 2")
    only(doctor.deepspeed(seconds=0.01), "problem", "took more than 0.01 s")
    monkeypatch.setattr(doctor.sys, "executable", "false")
    only(doctor.deepspeed(), "problem", "it cannot train one step: no output")


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: False)
    only(doctor.devices(), "note", "no GPU")
    assert "train.dtype=fp32" in only(doctor.devices(), "note", "emulates bf16").remedy
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    only(doctor.devices(), "warning", "PyTorch is a CPU build")


def test_gpus(monkeypatch):
    for name in ("is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(doctor, "triton", lambda: iter(()))
    for major, minor, level, text in ((9, 0, "ok", "sm_90"), (7, 5, "note", "no bf16")):
        facts = SimpleNamespace(name="NVIDIA X", major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, facts=facts: facts)
        only(doctor.devices(), level, text)


def test_the_compiler(monkeypatch, tmp_path):
    only(doctor.compiler(), "ok", "compiles C++20")
    broken = tmp_path / "old-g++"
    broken.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    only(doctor.compiler(), "warning", "unrecognized option -std=c++20")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "apt-get install g++" in only(doctor.compiler(), "warning", "no C++ compiler").remedy
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    only(doctor.compiler(), "warning", "ninja does not run")


# a target, its tokenizer, a head


@pytest.fixture
def own(tmp_path, tokenizer_dir):
    """A target that a test may break."""
    save_tiny_model(tmp_path / "base", tokenizer_dir)
    return tmp_path / "base"


def look(cfg, head=None):
    """(subject, findings) of the target's part."""
    subject = doctor_target.Subject(str(cfg.model.base))
    found = guarded("target", lambda: doctor_target.target(subject, cfg))
    found += guarded("tokenizer", lambda: doctor_target.tokens(subject, cfg))
    if head is not None:
        found += guarded("head", lambda: doctor_target.fit(subject, str(head)))
    return subject, found


def test_a_fit_target(base):
    subject, found = look(config(base))
    only(found, "ok", "its logits through our attention are the stock ones")
    assert {f.level for f in found} == {"ok"} and subject.target is not None
    count = sum(p.numel() for p in subject.model.parameters())
    assert subject.weight_bytes == 4 * count
    stored = doctor_target.weight_bytes(base, subject.model, "auto")
    assert stored == pytest.approx(4 * count, rel=0.02)


@pytest.mark.parametrize(
    ("model_type", "values", "text"),
    [
        ("mamba", {}, "recurrent state"),
        ("t5", {}, "Unrecognized configuration class"),
        ("no-such-model", {}, "no causal language model"),
        ("mpt", {"n_layers": 2, "d_model": 64, "n_heads": 4}, "ALiBi"),
        ("llama", {"hidden_act": "sine"}, "'sine'"),
    ],
)
def test_unfit_targets(tmp_path, model_type, values, text):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **values}))
    subject = doctor_target.Subject("x")
    [found] = guarded("target", lambda: doctor_target.target(subject, config(tmp_path)))
    assert found.level == "problem" and text in found.text and subject.model is None


def test_missing_and_damaged_targets(own, tmp_path):
    only(look(config(tmp_path / "none"))[1][:1], "problem", "none")
    (own / "model.safetensors").write_bytes(b"12345678")
    only(look(config(own))[1], "problem", "cannot load the target model")


def test_a_large_target_is_judged_without_its_weights(base, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_target, "SMALL", 1000)
    save_head(tiny_head(vocab=60), tmp_path / "head")
    subject, found = look(config(base), head=tmp_path / "head")
    only(found, "note", "logits were not compared")
    assert subject.target is None and subject.vocab_size > 300
    only(found, "problem", "its vocabulary is 60")


def test_a_tokenizer_that_is_too_large(own):
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.save_pretrained(own)
    told = only(look(config(own))[1], "problem", "the model only")
    assert "resize its embeddings" in told.remedy


def test_heads(base, tmp_path):
    head = tiny_head(hidden=32, vocab=look(config(base))[0].vocab_size, draft=64)
    save_head(head, tmp_path / "fits", {"training": {"step": 7}})
    subject, found = look(config(base), head=tmp_path / "fits")
    only(found, "ok", "draft vocabulary 64, trained for 7 steps")
    assert subject.head.draft_vocab_size == 64
    save_head(head, tmp_path / "foreign", {"target": {"fingerprint": "2:0", "id": "other"}})
    only(look(config(base), head=tmp_path / "foreign")[1], "warning", "trained on other")
    only(look(config(base), head=tmp_path / "none")[1], "problem", "no head folder")


# data


def examine(cfg):
    """Findings of the data's part."""
    subject, _ = look(cfg)
    return guarded("data", lambda: doctor_target.data(subject, cfg, []))


def of_format(base, path, data_format, **data):
    data = {"format": data_format, "path": str(path), "min_supervised_tokens": 1, **data}
    return config(base, data={"cache_dir": str(path.parent / "cache"), **data})


def test_good_data(base, data):
    found = examine(of_format(base, data, "fim"))
    assert {f.level for f in found} == {"ok"}, found
    for text in ("tokens, ", "answers end with a token that stops the model"):
        only(found, "ok", text)


def test_templates_that_are_missing_rewrite_or_do_not_stop(own, tmp_path):
    chats = [chat(f"Hi {n}?", "Yes.") for n in range(10)]
    path = write_jsonl(tmp_path / "d.jsonl", chats)
    cfg, template = of_format(own, path, "chat"), own / "chat_template.jinja"
    template.unlink()
    assert "data.format=instruction" in only(examine(cfg), "problem", "a chat template").remedy
    template.write_text(REWRITING)
    told = only(examine(cfg), "problem", "all 10 rows are unusable")
    assert "rewrites" in told.text and f"{path}:1" in told.text
    template.write_text(CHATML)
    told = only(examine(cfg), "warning", "answers do not end with a token that stops")
    assert "'<|im_end|>'" in told.text and "to eos_token_id" in told.remedy
    template.write_text(BARE)
    assert "set eos_token" in only(examine(cfg), "warning", "answers do not end").remedy


def test_bad_rows_are_told_by_reason_with_their_place(base, tmp_path):
    masked = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}
    good = [{"input_ids": [5, 6, n], "loss_mask": [0, 1, 1]} for n in range(40)]
    path = write_jsonl(tmp_path / "d.jsonl", [*good, "", "{", masked])
    found = examine(of_format(base, path, "tokenized"))
    assert f"{path}:42: malformed JSON" in only(found, "warning", "malformed JSON").text
    assert "check loss_mask/labels" in only(found, "warning", "all-zero loss mask").remedy
    found = examine(of_format(base, path, "tokenized", max_bad_fraction=0.01))
    assert len([f for f in found if f.level == "problem"]) == 2


def test_masks_that_are_odd(base, tmp_path):
    one = {"input_ids": [5] * 99, "loss_mask": [0] * 98 + [1]}
    most = {"input_ids": [5] * 30, "loss_mask": [0] + [1] * 29}
    middle = {"prefix": "a", "suffix": "", "middle": "def " * 90}
    for row, settings, level, text in (
        (most, {"max_length": 16}, "warning", "9 of 9 rows are cut"),
        (one, {}, "warning", "1.0% supervised"),
        (one, {"min_supervised_tokens": 100}, "problem", "9 supervised tokens, fewer"),
        (middle, {}, "warning", "supervised"),
    ):
        path = write_jsonl(tmp_path / "d.jsonl", [row] * 9)
        data_format = "fim" if row is middle else "tokenized"
        only(examine(of_format(base, path, data_format, **settings)), level, text)


def test_mixtures_and_files_that_are_not_there(base, data, tmp_path):
    code = {"format": "fim", "path": str(data), "name": "code"}
    mixed = {"format": "mixed", "min_supervised_tokens": 1, "cache_dir": str(tmp_path)}
    only(examine(config(base, data=mixed | {"mixture": [code, code]})), "ok", "code 2: 7")
    for none in ("path", "eval_path"):
        mixture = [code, code | {none: str(tmp_path / "no.jsonl")}]
        found = examine(config(base, data=mixed | {"mixture": mixture}))
        only(found, "problem", "no such data file")


# memory and disk


def test_needs(base, tmp_path, monkeypatch):
    assert 2**28 < doctor_target.available_memory(CPU) < 2**50
    train = {"output": str(tmp_path), "save_total_limit": 3, "dtype": "bf16"}
    cfg = config(base, train=train)
    subject, _ = look(cfg)
    assert {f.level for f in doctor_target.needs(subject, cfg, CPU)} == {"ok"}
    monkeypatch.setattr(doctor_target, "available_memory", lambda device: 1000)
    monkeypatch.setattr(doctor_target, "disk_usage", lambda path: SimpleNamespace(free=1000))
    memory, disk = doctor_target.needs(subject, cfg, CPU)
    assert "train.checkpoint_activations=true" in memory.remedy and memory.level == "problem"
    assert disk.level == "problem" and "train.save_total_limit" in disk.remedy


@pytest.mark.parametrize(("amp", "recompute"), [(False, False), (True, False), (False, True)])
def test_activations_are_what_autograd_keeps(amp, recompute):
    def teacher(start, stop):
        logits = torch.randn(stop - start, 300)
        return logits, torch.zeros(stop - start, dtype=torch.int64)

    head, steps, B, T = tiny_head(hidden=64, vocab=600, draft=300), 3, 2, 64
    module = UnrolledHead(head, steps, 0.8, LossConfig(), amp, recompute=recompute)
    plan = plan_unroll(torch.ones(B, T, dtype=torch.bool), steps)
    dtype = torch.bfloat16 if amp else torch.float32
    features = torch.randn(B * T, 3 * head.config.target_hidden_size, dtype=dtype)
    embeds = torch.randn(B * T, head.config.hidden_size, dtype=dtype)
    given = {x.untyped_storage().data_ptr() for x in (*module.parameters(), features, embeds)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(features, embeds, plan, teacher, plan.counts.float())
    train = {"batch_size": B, "ttt_steps": steps, "dtype": "bf16" if amp else "fp32"}
    cfg = config(train=train | {"checkpoint_activations": recompute}, data={"max_length": T})
    expected = doctor_target.memory(cfg, head.config, 1, 1, CPU)["activations"]
    # under amp a CPU also keeps fp32 copies of short rows for attention
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.3)


# the command


def test_the_command_on_a_fit_target_and_on_an_unfit_one(tmp_path, own, data, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "deepspeed", lambda zero: [])
    report = tmp_path / "out.json"
    overrides = (f"data.cache_dir={tmp_path}", f"train.output={tmp_path}/run")
    given = {"base": str(own), "data": str(data), "data_format": "fim", "num": 1}
    code, said = command(*overrides, **given, json=str(report)), capsys.readouterr().out
    assert code == 0, said
    for part in ("Installation", "Target", "Data", "Needs", "⟦", "0 problem"):
        assert part in said
    kept = json.loads(report.read_text())
    assert kept["counts"].get("problem", 0) == 0 and kept["seconds"] > 0
    assert all(bool(f["remedy"]) == (f["level"] != "ok") for f in kept["findings"])
    assert not (tmp_path / "run").exists()
    (own / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert command(base=str(own), json=str(report), color="never") == 1
    said = capsys.readouterr().out
    assert "recurrent state" in said and "Data" not in said
    with pytest.raises(EagleError, match="0 or more"):
        command(base=str(own), num=-1)
    assert json.loads(report.read_text())["counts"]["problem"] >= 1


@pytest.mark.parametrize(
    ("ours", "xdg", "expected"),
    [
        ("{}/ours", "{}/xdg", "ours"),
        ("~/ours", "", "ours"),
        ("", "{}/xdg", "xdg/eagle-heads"),
        ("", "", ".cache/eagle-heads"),
    ],
)
def test_one_rule_for_all_caches(monkeypatch, tmp_path, ours, xdg, expected):
    for name, value in {"HOME": "{}", "EAGLE_CACHE": ours, "XDG_CACHE_HOME": xdg}.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    root = tmp_path / expected
    assert compiled_folder() == root / "compiled" and cache_root(DataConfig()) == root / "tokenised"
