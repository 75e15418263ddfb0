"""`eagle convert`, `--probe`, `eagle inspect head`, and folders for a hub."""

import json
import runpy
import shutil
import sys

import pytest
import torch
from engine_helpers import make_head, make_prompts
from format_tables import PUBLISHED, fill, publish, published, without
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.heads.head import HeadConfig
from eagle.heads.head import make_head as new_head
from eagle.heads.probe import probe
from eagle.heads.read import read_folder
from eagle.model import EMBEDDED_HEAD, load_tokenizer
from eagle.target import Target


@pytest.fixture
def command(monkeypatch, capsys):
    """command("inference.convert", "SRC", …) -> exit code, stdout, stderr."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return run


# --- the command


def test_convert_between_all_formats(tmp_path, command):
    source, folder = EMBEDDED_HEAD, EMBEDDED_HEAD
    for name in ("sglang", "vllm", "modelopt", "eagle"):
        to = tmp_path / name
        code, shown, _ = command("inference.convert", folder, to, "--to", name)
        assert code == 0 and "feature layers entered [2, 8, 13]" in shown
        assert ("not for vLLM" in shown) == (name in ("sglang", "modelopt"))
        folder = to
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (source / file).read_bytes()


def test_convert_says_what_is_missing(tmp_path, command):
    folder = published(tmp_path / "head", "eagle-bin")
    code, _, said = command("inference.convert", folder, tmp_path / "out", "--to", "vllm")
    assert code == 1 and "--probe" in said and said.count("\n") == 1
    ids = ("--layer_ids", "0,1,2", "--convention", "output")
    code, _, said = command("inference.convert", folder, tmp_path / "out", "--to", "vllm", *ids)
    assert code == 1 and "names the head's target" in said
    named = ("--base_model", "some/target")
    code, _, said = command(
        "inference.convert", folder, tmp_path / "out", "--to", "vllm", *ids, *named
    )
    assert code == 0, said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    for wrong, remedy in (
        (("--to", "gguf"), "eagle, sglang, vllm, modelopt"),
        (("--to", "vllm", "--layer_ids", "0,1"), "three numbers"),
        (("--to", "vllm", "--layer_ids", "0,1,2"), "--convention"),
        ((), "--to eagle|sglang|vllm|modelopt"),
        (("--to", "vllm", "--probe"), "--target"),
        (("--to", "vllm", "--from", "sglang", *ids), "missing: d2t, midlayer.hidden_norm"),
    ):
        if "missing" in remedy:  # read by another format's table
            tensors, config, kind = PUBLISHED["modelopt"]
            publish(folder, fill(without(tensors, "d2t")), config, kind)
        code, _, said = command("inference.convert", folder, tmp_path / "no", *wrong)
        assert code == 1 and remedy in said, said
        assert not (tmp_path / "no").exists()
    code, _, said = command("inference.convert", EMBEDDED_HEAD, EMBEDDED_HEAD, "--to", "vllm")
    assert code == 1 and "the source itself" in said


def test_eagle1_files_hold_the_targets_embedding(tmp_path, llama, command):
    llama.model.save_pretrained(tmp_path / "target")
    config = HeadConfig.for_target(llama.config, method="eagle1")
    source = save_head(new_head(config), tmp_path / "head")
    arguments = (source, tmp_path / "out", "--to", "eagle", "--target", tmp_path / "target")
    code, shown, said = command("inference.convert", *arguments)
    assert code == 0 and "not for vLLM: it loads an EAGLE-1 folder" in shown, said
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == PUBLISHED["eagle1-bin"][0]
    assert torch.equal(tensors["embed_tokens.weight"], llama.embed.weight)
    assert load_head(tmp_path / "out", llama)[0].config == config


# --- layer ids


@pytest.fixture(scope="module")
def embedded():
    return Target.from_pretrained(None, dtype="float32")


@pytest.mark.slow
def test_probe_finds_the_wrong_convention(tmp_path, embedded):
    """The shipped head in SGLang's format with the ids of EAGLE, which should be 1, 7, 12 there."""
    from records.prompts import load_prompts

    config = json.loads((EMBEDDED_HEAD / "config.json").read_text())
    config = without(
        config, "eagle_aux_hidden_state_layer_ids", "eagle_aux_hidden_state_convention"
    )
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [2, 8, 13]}
    folder = publish(tmp_path / "head", load_file(EMBEDDED_HEAD / "model.safetensors"), config)
    assert load_head(folder, embedded)[0].config.feature_layers == (3, 9, 14)  # as it is written
    prompts = load_prompts(None, load_tokenizer("embedded"), 8)
    found = probe(read_folder(folder), embedded, [p.ids for p in prompts], 48)
    assert found.clear and found.best.layers == (2, 8, 13)
    assert found.require_clear().convention == "entering"
    assert [r.convention for r in found.readings[1:]] == ["output", "one-based"]


def test_probe_does_not_guess(tmp_path, llama):
    """Random heads are equally bad under each reading."""
    folder = save_head(make_head(llama), tmp_path / "head")
    found = probe(read_folder(folder), llama, make_prompts((4, 6)), 6)
    assert len(found.readings) >= 2 and not found.clear
    with pytest.raises(EagleError, match="cannot tell"):
        found.require_clear()
    eagle1 = published(tmp_path / "eagle1", "eagle1-bin")
    with pytest.raises(EagleError, match="there are no ids"):
        probe(read_folder(eagle1), llama, make_prompts((4,)), 4)


# --- what a head says of itself


def test_inspect_head(tmp_path, command):
    code, shown, _ = command("inference.inspect_head", EMBEDDED_HEAD)
    recorded = json.loads((EMBEDDED_HEAD / "eagle.json").read_text())
    assert code == 0
    for part in (
        "3072 of 4096",
        "[2, 8, 13] (entering)",
        "hidden 256",
        recorded["target"]["fingerprint"],
    ):
        assert part in shown, part
    code, text, _ = command("inference.inspect_head", EMBEDDED_HEAD, "--json")
    said = json.loads(text)
    command("inference.convert", EMBEDDED_HEAD, tmp_path / "other", "--to", "modelopt")
    _, text, _ = command("inference.inspect_head", tmp_path / "other", "--json")
    other = json.loads(text)
    assert (other["format"], other["feature_layers"]["written"]) == ("modelopt", [1, 7, 12])
    assert other["feature_layers"]["entering"] == [2, 8, 13]
    for same in ("fingerprint", "draft_vocabulary", "belongs_to", "geometry"):
        assert other[same] == said[same], same


def test_inspect_head_without_ids(tmp_path, command):
    code, shown, _ = command("inference.inspect_head", published(tmp_path / "head", "eagle-bin"))
    assert code == 0 and "absent; measure them with" in shown


@pytest.mark.parametrize("known", [True, False], ids=["its-target", "another"])
def test_inspect_head_beside_a_target(tmp_path, llama, command, known):
    llama.model.save_pretrained(tmp_path / "target")
    fingerprint = llama.identity["fingerprint"] if known else "0" * 64
    record = {"target": {"id": "trained on", "fingerprint": fingerprint}}
    head = save_head(make_head(llama), tmp_path / "head", record)
    code, shown, _ = command("inference.inspect_head", head, "--target", tmp_path / "target")
    assert (code, "fits this target" in shown) == ((0, True) if known else (1, False))
    assert known or "differs: it was trained on trained on (weights 000000000000)" in shown


# --- folders for a hub


BENCH = {
    "model": "tiny-llama",
    "device": "a machine",
    "dtype": "float32",
    "versions": {"torch": "2.13"},
    "repeats": 3,
    "num_prompts": 8,
    "max_new_tokens": 96,
    "command": "python -m inference.bench --head HEAD",
    "runs": [
        {"engine": "hf", "batch_size": 1, "temperature": 0.0, "tokens_per_second": 132.0},
        {
            "engine": "eagle",
            "batch_size": 1,
            "temperature": 0.0,
            "tree": "16,4,4",
            "tau": 4.254,
            "tokens_per_second": 295.1,
            "vs_hf": 2.237,
            "vs_best_vanilla": 0.9,
            "identical": True,
        },
    ],
}


@pytest.fixture
def head_folder(tmp_path, llama):
    return save_head(make_head(llama), tmp_path / "head", {"target": {"id": "tiny-llama"}})


def pack(command, head, to, *more):
    names = ("--license", "apache-2.0", "--base_model", "some/model")
    return command("inference.convert", head, to, "--to", "vllm", "--pack", *names, *more)


def test_stock_generate_with_the_folder(tmp_path, llama, head_folder, command, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code, _, said = pack(command, head_folder, tmp_path / "packed")
    assert code == 0, said
    shutil.move(tmp_path / "packed", tmp_path / "moved")  # nothing in it knows where it was
    model = LlamaForCausalLM(llama.model.config).eval()
    model.load_state_dict(llama.model.state_dict())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    expected = model.generate(ids, **options)
    folder = str(tmp_path / "moved")
    for _ in range(2):
        found = model.generate(ids, custom_generate=folder, trust_remote_code=True, **options)
        assert torch.equal(found, expected)
    (engine,) = model._eagle_engines.values()  # the engine is kept, and it drafts
    assert engine.head is not None and engine.target.model is model
    assert torch.equal(model.generate(ids, **options), expected)


def test_card_has_what_was_measured(tmp_path, head_folder, command):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(BENCH))
    assert pack(command, head_folder, tmp_path / "packed", "--bench", bench)[0] == 0
    card = (tmp_path / "packed/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: some/model\n")
    row = "| eagle | 1 | 0.0 | 16,4,4 | 4.254 | 295.1 | 2.237 | 0.9 | True |"
    assert row in card and "| hf |" not in card and "a machine" in card
    assert json.loads((tmp_path / "packed/bench.json").read_text()) == BENCH
    assert pack(command, head_folder, tmp_path / "plain")[0] == 0
    plain = (tmp_path / "plain/README.md").read_text()
    assert "Nothing was measured" in plain and "tokens/s" not in plain


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "another"}, "measure this head"),
        ({"runs": BENCH["runs"][:1]}, "no run of an eagle engine"),
        ({"runs": [BENCH["runs"][1] | {"forced_acceptance": 3}]}, "forced acceptance"),
    ],
    ids=["target", "no-head", "forced"],
)
def test_numbers_of_something_else_are_refused(tmp_path, head_folder, command, change, said):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(BENCH | change))
    code, _, error = pack(command, head_folder, tmp_path / "packed", "--bench", bench)
    assert code == 1 and said in error and not (tmp_path / "packed").exists()


def test_a_card_needs_a_licence_and_a_target(tmp_path, head_folder, command):
    code, _, said = command(
        "inference.convert", head_folder, tmp_path / "no", "--to", "eagle", "--pack"
    )
    assert code == 1 and "--license" in said
