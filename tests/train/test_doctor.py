"""Each finding of the doctor is met by what it is there to find."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import commands
import pytest
import torch
from data_helpers import REWRITING, chat, write_jsonl
from head_helpers import save_tiny_model, tiny_head, write_fim

from configs.schema import DataConfig, HeadTrainConfig
from eagle.checkpoint import save_head
from eagle.errors import EagleError
from train import doctor_machine as doctor
from train import doctor_target
from train.doctor_machine import Finding, guarded

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
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


@pytest.mark.parametrize(
    ("version", "level", "text"),
    [
        ("2.4.1", "problem", "older"),
        ("2.9.0rc1", "problem", "older"),
        ("2.13.0+cu130", "ok", "torch 2.13.0+cu130"),
        ("3.0", "warning", "newer"),
        (None, "problem", "not installed"),
    ],
)
def test_versions_are_held_against_the_supported_range(monkeypatch, version, level, text):
    needs = ["torch>=2.9,<2.14", 'triton>=3; platform_system == "No"', 'peft>=1; extra == "x"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    found = {"torch": version}
    monkeypatch.setattr(doctor, "_version", found.get)
    told = only(doctor.versions(), level, text)
    assert level == "ok" or told.remedy == "pip install 'torch<2.14,>=2.9'"
    found["peft"] = "0.1"
    only(doctor.versions(), "problem", "peft 0.1 is older")
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    only(doctor.versions(), "warning", "is untested")


def test_this_installation_is_in_range():
    assert not [f for f in doctor.versions() if f.level == "problem"]


def test_names_that_others_have_too(monkeypatch, tmp_path):
    owners = {"eagle": ["eagle-heads", "eagle-llm"], "kernels": ["eagle-heads", "kernels"]}
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: owners)
    found = list(doctor.clashes())
    assert "pip uninstall eagle-llm" in only(found, "problem", "eagle-llm also installs").remedy
    only(found, "ok", "beside Hugging Face's (kernels)")
    monkeypatch.setattr(doctor.metadata, "packages_distributions", dict)
    assert [f.level for f in doctor.clashes()] == ["ok"]
    find = doctor.importlib.util.find_spec

    def elsewhere(name):
        if name == "configs":
            return SimpleNamespace(submodule_search_locations=[str(tmp_path / "configs")])
        return None if name == "kernels.tree_attention" else find(name)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", elsewhere)
    found = list(doctor.clashes())
    only(found, "problem", f"'import configs' finds {tmp_path}")
    only(found, "problem", "another package 'kernels' hides ours")


def test_deepspeed_trains_a_step_or_says_why_not(monkeypatch, tmp_path):
    only(doctor.deepspeed(zero=2), "ok", "trains a step alone with ZeRO 2")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise ImportError('op_builder is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    only(doctor.deepspeed(), "problem", "op_builder is broken")
    only(doctor.deepspeed(seconds=0.01), "problem", "took more than 0.01 s")


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    only(doctor.devices(), "note", "no GPU")
    monkeypatch.setattr("eagle.loading.fast_bf16", lambda device: False)
    assert "train.dtype=fp32" in only(doctor.devices(), "note", "emulates bf16").remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    only(doctor.devices(), "note", "GPUs are hidden")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    only(doctor.devices(), "warning", "PyTorch is a CPU build")


@pytest.mark.parametrize(
    ("capability", "free", "level", "text"),
    [
        ((9, 0), 0.9, "ok", "sm_90"),
        ((9, 0), 0.2, "warning", "others hold the rest"),
        ((7, 5), 0.9, "note", "no bf16"),
    ],
)
def test_gpus(monkeypatch, capability, free, level, text):
    facts = SimpleNamespace(name="NVIDIA X", major=capability[0], minor=capability[1])
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: facts,
        "mem_get_info": lambda index: (int(free * 80 * 2**30), 80 * 2**30),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(doctor, "triton", lambda: iter(()))
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


@pytest.mark.parametrize(
    ("free", "level"), [(2**29, "problem"), (3 * 2**30, "warning"), (2**40, "ok")]
)
def test_free_disk(monkeypatch, tmp_path, free, level):
    given = {"data": {"cache_dir": str(tmp_path / "cache")}, "train": {"output": str(tmp_path)}}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = list(doctor.disk(config(**given)))
    assert [f.level for f in found] == [level] * 2 and str(tmp_path / "cache") in found[0].text
    (tmp_path / "file").touch()
    given["train"] = {"output": str(tmp_path / "file" / "run")}
    only(doctor.disk(config(**given)), "problem", "cannot be written")


# a target, its tokenizer, a head


@pytest.fixture(scope="module")
def shared_base(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, tokenizer_dir)
    return folder


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A copy that a test may break."""
    save_tiny_model(tmp_path / "base", tokenizer_dir)
    return tmp_path / "base"


def look(cfg, formats=(), head=None):
    """(subject, findings) of the target's part."""
    subject = doctor_target.Subject(str(cfg.model.base))
    found = guarded("target", lambda: doctor_target.target(subject, cfg))
    found += guarded("tokenizer", lambda: doctor_target.tokens(subject, cfg, set(formats)))
    if head is not None:
        found += guarded("head", lambda: doctor_target.fit(subject, str(head)))
    return subject, found


def test_a_fit_target(shared_base):
    subject, found = look(config(shared_base), {"fim"})
    only(found, "ok", "its logits through our attention are the stock ones")
    assert {f.level for f in found} == {"ok"} and subject.target is not None
    count = sum(p.numel() for p in subject.model.parameters())
    assert subject.weight_bytes == 4 * count
    stored = doctor_target.weight_bytes(shared_base, subject.model, "auto")
    assert stored == pytest.approx(4 * count, rel=0.02)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "t5"}, "not causal language models"),
        ({"model_type": "no-such-model"}, "no model config"),
        ({"model_type": "mpt", "n_layers": 2, "d_model": 64, "n_heads": 4}, "ALiBi"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "no model config"),
        ({"model_type": "llama", "hidden_act": "sine"}, "makes no 'llama' model: 'sine'"),
    ],
)
def test_unfit_targets(tmp_path, values, text):
    (tmp_path / "config.json").write_text(json.dumps(values))
    subject = doctor_target.Subject("x")
    [found] = guarded("target", lambda: doctor_target.target(subject, config(tmp_path)))
    assert found.level == "problem" and text in found.text and subject.model is None


def test_missing_and_damaged_targets(base, tmp_path):
    only(look(config(tmp_path / "none"))[1][:1], "problem", "none")
    (base / "model.safetensors").write_bytes(b"12345678")
    only(look(config(base))[1], "problem", "cannot load the target model")


def test_a_large_target_is_judged_without_its_weights(shared_base, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_target, "SMALL", 1000)
    subject, found = look(config(shared_base))
    only(found, "note", "logits were not compared")
    assert subject.target is None and subject.vocab_size > 300
    save_head(tiny_head(vocab=60), tmp_path / "head")
    only(look(config(shared_base), head=tmp_path / "head")[1], "problem", "its vocabulary is 60")


def change_tokenizer(base, change):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    tokenizer.save_pretrained(base)


def test_tokenizers(base):
    change_tokenizer(base, lambda t: setattr(t, "eos_token", "<|im_end|>"))
    told = only(look(config(base))[1], "warning", "'<|im_end|>'")
    assert "not among the model's end tokens ['<|endoftext|>']" in told.text
    for file in ("config.json", "generation_config.json"):
        given = json.loads((base / file).read_text()) | {"eos_token_id": None}
        (base / file).write_text(json.dumps(given))
    only(look(config(base))[1], "warning", "names none")
    change_tokenizer(base, lambda t: setattr(t, "eos_token", None))
    only(look(config(base))[1], "problem", "the tokenizer has none, so supervised rows end without")
    change_tokenizer(base, lambda t: t.add_tokens([f"<extra{n}>" for n in range(40)]))
    told = only(look(config(base))[1], "problem", "the model only")
    assert "resize its embeddings" in told.remedy
    change_tokenizer(base, lambda t: setattr(t, "chat_template", None))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokens = {"prefix": "<P>", "suffix": "<S>", "middle": "<M>", "eot": "<E>"}
    found = look(config(base, data={"fim_tokens": tokens}), {"chat", "fim"})[1]
    assert "data.format=instruction" in only(found, "problem", "the data is chat").remedy
    assert [f.level for f in found if f.check == "fim tokens"] == ["problem"]


def test_heads(shared_base, tmp_path):
    subject, _ = look(config(shared_base))
    head = tiny_head(hidden=32, vocab=subject.vocab_size, draft=64)
    save_head(head, tmp_path / "fits", {"training": {"step": 7}})
    subject, found = look(config(shared_base), head=tmp_path / "fits")
    only(found, "ok", "draft vocabulary 64, trained for 7 steps")
    assert subject.head_config(config(shared_base)).draft_vocab_size == 64
    save_head(head, tmp_path / "foreign", {"target": {"fingerprint": "0" * 64, "id": "other"}})
    only(look(config(shared_base), head=tmp_path / "foreign")[1], "warning", "trained on other")
    only(look(config(shared_base), head=tmp_path / "none")[1], "problem", "no head folder")


# data


def examine(cfg, head=None):
    """Findings of the data's part."""
    subject, _ = look(cfg, head=head)
    sampled, found = [], []
    for source in doctor_target.sources(cfg.data):
        found += guarded("data", partial(doctor_target.data, source, subject, cfg, sampled))
    return found + list(doctor_target.vocabulary(sampled, subject, cfg)) * bool(sampled)


def of_format(base, path, data_format, draft=300, **data):
    data = {"format": data_format, "path": str(path), "min_supervised_tokens": 1, **data}
    return config(base, data=data, model={"draft_vocab_size": draft})


def test_good_data(shared_base, tmp_path, monkeypatch):
    write_fim(tmp_path / "d.jsonl")
    cfg = of_format(shared_base, tmp_path / "d.jsonl", "fim")
    found = examine(cfg)
    assert {f.level for f in found} == {"ok"}, found
    only(found, "ok", "all 80 records give 80 rows")
    only(found, "ok", "answers end with a token that stops the model")
    monkeypatch.setattr(doctor_target, "RECORDS", 20)
    only(examine(cfg), "ok", "the first 20 records give 20 rows")


def test_templates_that_rewrite_drop_or_do_not_stop(base, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("a", "b", "c", "d")] * 3)
    last = CHATML.replace("messages", "messages[-2:]")
    for template, reason in ((REWRITING, "rewrites"), (last, "drops")):
        (base / "chat_template.jinja").write_text(template)
        told = only(examine(of_format(base, path, "chat")), "problem", "3 of 3 records")
        assert reason in told.text and f"{path}:1" in told.text
    path = write_jsonl(tmp_path / "e.jsonl", [chat("Hi?", "Yes."), chat("Ho?", "No.")] * 5)
    (base / "chat_template.jinja").write_text(CHATML)
    told = only(examine(of_format(base, path, "chat")), "warning", "'<|im_end|>'")
    assert "10 of 10 answers end with" in told.text and "to eos_token_id" in told.remedy
    (base / "chat_template.jinja").write_text(BARE)
    only(examine(of_format(base, path, "chat")), "warning", "end without an end token")


def test_bad_rows_are_told_by_reason_with_their_place(shared_base, tmp_path):
    masked = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}
    path = write_jsonl(tmp_path / "d.jsonl", [masked] * 4)
    only(examine(of_format(shared_base, path, "tokenized")), "problem", "no row of 4 records")
    good = masked | {"loss_mask": [0, 1, 1]}
    path = write_jsonl(tmp_path / "d.jsonl", [*[good] * 40, "", "{", masked])
    found = examine(of_format(shared_base, path, "tokenized"))
    assert f"{path}:42: malformed JSON" in only(found, "warning", "malformed JSON").text
    assert "check loss_mask/labels" in only(found, "warning", "all-zero loss mask").remedy
    found = examine(of_format(shared_base, path, "tokenized", max_bad_fraction=0.01))
    assert len([f for f in found if f.level == "problem"]) == 2
    path.write_bytes(path.read_bytes() + b'{"input_ids": "\xff"}\n')
    found = examine(of_format(shared_base, path, "tokenized", max_bad_fraction=0.5))
    only(found, "warning", f"{path}:44: not UTF-8")


def test_rows_that_are_cut_and_masks_that_are_odd(shared_base, tmp_path):
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"input_ids": [5] * 30, "loss_mask": [0] + [1] * 29}] * 9
    )
    found = examine(of_format(shared_base, path, "tokenized", max_length=16))
    assert "raise data.max_length" in only(found, "warning", "9 of 9 rows are cut").remedy
    row = {"input_ids": [5] * 99, "loss_mask": [0] * 98 + [1]}
    path = write_jsonl(tmp_path / "e.jsonl", [row] * 9)
    only(examine(of_format(shared_base, path, "tokenized")), "warning", "1.0% supervised")
    found = examine(of_format(shared_base, path, "tokenized", min_supervised_tokens=100))
    assert "add data" in only(found, "problem", "9 supervised tokens are too few").remedy
    long = {"prefix": "a", "suffix": "", "middle": "def " * 90}
    path = write_jsonl(tmp_path / "f.jsonl", [long] * 9)
    only(examine(of_format(shared_base, path, "fim")), "warning", "prompts too?")


@pytest.mark.parametrize(
    ("draft", "count", "high", "level", "text"),
    [
        (300, 200, 360, "warning", "hold"),
        (60, 200, 360, "problem", "hold"),
        (300, 9, 360, "note", "few rows"),
        (5, 200, 360, "problem", "special"),
        (300, 200, 250, "ok", "hold"),
    ],
)
def test_draft_vocabularies(shared_base, tmp_path, draft, count, high, level, text):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(20, high, (count, 40), generator=rng).tolist()
    rows = [{"input_ids": i, "loss_mask": [0] + [1] * 39} for i in ids]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    found = examine(of_format(shared_base, path, "tokenized", draft=draft))
    only([f for f in found if f.check == "draft vocabulary"], level, text)


def test_the_vocabulary_of_a_head_that_is_given(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    vocab = look(config(shared_base))[0].vocab_size
    save_head(tiny_head(hidden=32, vocab=vocab, draft=8), tmp_path / "head")
    cfg = of_format(shared_base, tmp_path / "d.jsonl", "fim")
    only(examine(cfg, tmp_path / "head"), "problem", f"8 of {vocab} tokens hold")


def test_mixtures_and_files_that_are_not_there(shared_base, tmp_path):
    write_fim(tmp_path / "d.jsonl")
    code = {"format": "fim", "path": str(tmp_path / "d.jsonl")}
    none = str(tmp_path / "no.jsonl")
    mixture = [
        code | {"name": "code"},
        {"format": "chat", "path": none},
        code | {"eval_path": none},
    ]
    model = {"draft_vocab_size": 300}
    found = examine(config(shared_base, data={"format": "mixed", "mixture": mixture}, model=model))
    only(found, "ok", "code: all 80 records")
    missing = [f for f in found if "no such data file" in f.text and f.level == "problem"]
    assert len(missing) == 2
    assert len(doctor_target.sources(DataConfig(format="mixed"))) == 3


# memory and disk


def test_needs(shared_base, tmp_path, monkeypatch):
    train = {"output": str(tmp_path), "save_total_limit": 3, "dtype": "bf16"}
    cfg = config(shared_base, train=train, model={"draft_vocab_size": 300})
    subject, _ = look(cfg)
    device = torch.device("cpu")
    assert {f.level for f in doctor_target.needs(subject, cfg, device)} == {"ok"}
    monkeypatch.setattr(doctor_target, "available_memory", lambda device: 1000)
    monkeypatch.setattr(doctor_target, "free_bytes", lambda folder: 1000)
    memory, disk = doctor_target.needs(subject, cfg, device)
    assert "train.checkpoint_activations=true" in memory.remedy and memory.level == "problem"
    assert disk.level == "problem" and "train.save_total_limit" in disk.remedy
    assert doctor_target.checkpoint_bytes(cfg, 1000) == 14_000


def test_available_memory_is_what_there_is():
    assert 2**28 < doctor_target.available_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(amp, recompute):
    from configs.schema import LossConfig
    from eagle.heads.head import Eagle3Head
    from train.head.ttt import UnrolledHead, plan_unroll

    def teacher(start, stop):
        logits = torch.randn(stop - start, 300)
        return logits, torch.zeros(stop - start, dtype=torch.int64)

    head, steps, B, T = tiny_head(hidden=64, vocab=600, draft=300), 3, 2, 64
    assert isinstance(head, Eagle3Head)
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
    expected = doctor_target.head_memory(cfg, head.config, 1, torch.device("cpu"))["activations"]
    # under amp a CPU also keeps fp32 copies of short rows for attention
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.3)


# the command


@pytest.mark.slow
def test_the_command_on_a_fit_target_and_on_an_unfit_one(tmp_path, base):
    write_fim(tmp_path / "fim.jsonl")
    flags = f"--base {base} --data {tmp_path}/fim.jsonl --data_format fim --num 1"
    report = tmp_path / "out.json"
    overrides = f"--json {report} data.cache_dir={tmp_path} train.output={tmp_path}/run"
    done = commands.run("train.doctor", *flags.split(), *overrides.split())
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("Installation", "Target", "Data", "Needs", "⟦", "0 problem"):
        assert part in done.stdout
    kept = json.loads(report.read_text())
    assert kept["counts"].get("problem", 0) == 0 and kept["seconds"] > 0
    assert all(bool(f["remedy"]) == (f["level"] != "ok") for f in kept["findings"])
    assert not (tmp_path / "run").exists()
    (base / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    done = commands.run("train.doctor", "--base", base, "--json", report, "--color", "never")
    assert done.returncode == 1 and "recurrent state" in done.stdout and "Data" not in done.stdout
    assert json.loads(report.read_text())["counts"]["problem"] >= 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--bass x", "did you mean --base?"),
        ("--num -1", "0 or more"),
        ("train.zreo=1", "did you mean train.zero?"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, text):
    done = commands.run("train.doctor", *arguments.split())
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
    from eagle.compile import compiled_folder
    from records.cache import cache_root

    for name in ("EAGLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **environment}.items():
        fixed = value.startswith("~") or not value
        monkeypatch.setenv(name, value if fixed else str(tmp_path / value))
    root = tmp_path / expected
    assert compiled_folder() == root / "compiled" and cache_root(DataConfig()) == root / "tokenised"
    assert root in doctor.folders(HeadTrainConfig()).values()
