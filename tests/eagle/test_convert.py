"""`eagle convert`, `--probe`, `eagle inspect head`, and folders for a hub."""

import json
from functools import partial

import pytest
import torch
from commands import here
from engine_helpers import make_head, make_prompts
from format_tables import PUBLISHED, fill, publish, published, without
from safetensors.torch import load_file

from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.heads import remote_generate
from eagle.heads.head import HeadConfig
from eagle.heads.head import make_head as new_head
from eagle.heads.probe import probe
from eagle.heads.read import read_folder
from eagle.model import EMBEDDED_HEAD, load_tokenizer
from eagle.target import Target

CONVERT, INSPECT = "inference.convert", "inference.inspect_head"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(CONVERT, "SRC", …) -> exit code, stdout, stderr."""
    return partial(here, monkeypatch, capsys)


def test_convert_between_all_formats(tmp_path, command):
    folder = EMBEDDED_HEAD
    for name in ("sglang", "vllm", "modelopt", "eagle"):
        code, shown, _ = command(CONVERT, folder, tmp_path / name, "--to", name)
        assert code == 0 and "feature layers entered [2, 8, 13]" in shown
        assert ("not for vLLM" in shown) == (name in ("sglang", "modelopt"))
        folder = tmp_path / name
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (EMBEDDED_HEAD / file).read_bytes()


def test_convert_says_what_is_missing(tmp_path, command):
    folder = published(tmp_path / "head", "eagle-bin")
    to_vllm, ids = ("--to", "vllm"), ("--layer_ids", "0,1,2", "--convention", "output")
    for wrong, remedy in (
        (to_vllm, "--probe"),
        ((*to_vllm, *ids), "names the head's target"),
        (("--to", "gguf"), "eagle, sglang, vllm, modelopt"),
        ((*to_vllm, "--layer_ids", "0,1"), "three numbers"),
        ((*to_vllm, "--layer_ids", "0,1,2"), "--convention"),
        ((), "--to eagle|sglang|vllm|modelopt"),
        ((*to_vllm, "--probe"), "--target"),
        (("--to", "eagle", *ids, "--pack"), "--license"),
    ):
        code, _, said = command(CONVERT, folder, tmp_path / "no", *wrong)
        assert code == 1 and remedy in said and said.count("\n") == 1, said
        assert not (tmp_path / "no").exists()
    out = tmp_path / "out"
    code, _, said = command(CONVERT, folder, out, *to_vllm, *ids, "--base_model", "some/target")
    assert code == 0, said
    config = json.loads((out / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    tensors, config, kind = PUBLISHED["modelopt"]  # read by another format's table
    publish(folder, fill(without(tensors, "d2t")), config, kind)
    code, _, said = command(CONVERT, folder, tmp_path / "no", *to_vllm, "--from", "sglang", *ids)
    assert code == 1 and "missing: d2t, midlayer.hidden_norm" in said
    code, _, said = command(CONVERT, EMBEDDED_HEAD, EMBEDDED_HEAD, *to_vllm)
    assert code == 1 and "the source itself" in said


def test_eagle1_files_hold_the_targets_embedding(tmp_path, llama, command):
    llama.model.save_pretrained(tmp_path / "target")
    config = HeadConfig.for_target(llama.config, method="eagle1")
    source = save_head(new_head(config), tmp_path / "head")
    arguments = (source, tmp_path / "out", "--to", "eagle", "--target", tmp_path / "target")
    code, shown, said = command(CONVERT, *arguments)
    assert code == 0 and "not for vLLM: it loads an EAGLE-1 folder" in shown, said
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == PUBLISHED["eagle1-bin"][0]
    assert torch.equal(tensors["embed_tokens.weight"], llama.embed.weight)
    assert load_head(tmp_path / "out", llama)[0].config == config


@pytest.mark.slow
def test_probe_finds_the_wrong_convention(tmp_path):
    """The shipped head in SGLang's format with the ids of EAGLE, which should be 1, 7, 12 there."""
    from records.prompts import load_prompts

    embedded = Target.from_pretrained(None, dtype="float32")
    ids = "eagle_aux_hidden_state_layer_ids"
    config = json.loads((EMBEDDED_HEAD / "config.json").read_text())
    config = without(config, ids, "eagle_aux_hidden_state_convention")
    config["eagle_config"] = {ids: [2, 8, 13]}
    folder = publish(tmp_path / "head", load_file(EMBEDDED_HEAD / "model.safetensors"), config)
    assert load_head(folder, embedded)[0].config.feature_layers == (3, 9, 14)  # as it is written
    prompts = load_prompts(None, load_tokenizer("embedded"), 8)
    found = probe(read_folder(folder), embedded, [p.ids for p in prompts], 48)
    assert found.best().layers == (2, 8, 13)
    assert [r.convention for r in found.readings] == ["entering", "output", "one-based"]


def test_probe_does_not_guess(tmp_path, llama):
    """Random heads are equally bad under each reading."""
    folder = save_head(make_head(llama), tmp_path / "head")
    found = probe(read_folder(folder), llama, make_prompts((4, 6)), 6)
    assert len(found.readings) >= 2
    with pytest.raises(EagleError, match="cannot tell"):
        found.best()
    eagle1 = published(tmp_path / "eagle1", "eagle1-bin")
    with pytest.raises(EagleError, match="there are no ids"):
        probe(read_folder(eagle1), llama, make_prompts((4,)), 4)


def test_inspect_head(tmp_path, command):
    code, shown, _ = command(INSPECT, EMBEDDED_HEAD)
    fingerprint = json.loads((EMBEDDED_HEAD / "eagle.json").read_text())["target"]["fingerprint"]
    assert code == 0
    for part in ("3072 of 4096", "[2, 8, 13] (entering)", "hidden 256", fingerprint):
        assert part in shown, part
    said = json.loads(command(INSPECT, EMBEDDED_HEAD, "--json")[1])
    command(CONVERT, EMBEDDED_HEAD, tmp_path / "other", "--to", "modelopt")
    other = json.loads(command(INSPECT, tmp_path / "other", "--json")[1])
    layers = {"entering": [2, 8, 13], "written": [1, 7, 12], "convention": "output"}
    assert (other["format"], other["feature_layers"]) == ("modelopt", layers)
    for same in ("fingerprint", "draft_vocabulary", "belongs_to", "geometry"):
        assert other[same] == said[same], same
    code, shown, _ = command(INSPECT, published(tmp_path / "head", "eagle-bin"))
    assert code == 0 and "absent; measure them with" in shown


@pytest.mark.parametrize("known", [True, False], ids=["its-target", "another"])
def test_inspect_head_beside_a_target(tmp_path, llama, command, known):
    llama.model.save_pretrained(tmp_path / "target")
    fingerprint = llama.identity["fingerprint"] if known else "2:0"
    record = {"target": {"id": "trained on", "fingerprint": fingerprint}}
    head = save_head(make_head(llama), tmp_path / "head", record)
    code, shown, _ = command(INSPECT, head, "--target", tmp_path / "target")
    assert (code, "fits this target" in shown) == ((0, True) if known else (1, False))
    assert known or "differs: it was trained on trained on (weights 2:0)" in shown


PLAIN = {"engine": "hf", "batch_size": 1, "temperature": 0.0, "tokens_per_second": 132.0}
DRAFTED = PLAIN | {"engine": "eagle", "tree": "16,4,4", "tau": 4.254, "tokens_per_second": 295.1}
DRAFTED |= {"vs_hf": 2.237, "vs_best_vanilla": 0.9, "identical": True}
BENCH = {"model": "tiny-llama", "device": "a machine", "runs": [PLAIN, DRAFTED]}


def pack(command, tmp_path, llama, bench=None):
    """A head of tiny-llama, packed -> exit code, stderr, the packed folder."""
    record, packed = {"target": {"id": "tiny-llama"}}, tmp_path / "packed"
    head = save_head(make_head(llama), tmp_path / "head", record)
    names = ["--license", "apache-2.0", "--base_model", "some/model"]
    if bench is not None:
        (tmp_path / "bench.json").write_text(bench)
        names += ["--bench", tmp_path / "bench.json"]
    code, _, said = command(CONVERT, head, packed, "--to", "vllm", "--pack", *names)
    return code, said, packed


def test_card_has_what_was_measured(tmp_path, llama, command):
    code, said, packed = pack(command, tmp_path, llama, json.dumps(BENCH))
    assert code == 0, said
    card = (packed / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: some/model\n")
    row = "| eagle | 1 | 0.0 | 16,4,4 | 4.254 | 295.1 | 2.237 | 0.9 | True |"
    assert row in card and "| hf |" not in card and "a machine" in card
    assert "| target | tiny-llama, hidden 32 |" in card and str(tmp_path) not in card
    assert json.loads((packed / "bench.json").read_text()) == BENCH
    with open(remote_generate.__file__) as script:
        assert (packed / "custom_generate/generate.py").read_text() == script.read()
    _, _, packed = pack(command, tmp_path, llama)
    plain = (packed / "README.md").read_text()
    assert "Nothing was measured" in plain and "tokens/s" not in plain


@pytest.mark.parametrize(
    "bench, said",
    [
        (json.dumps(BENCH | {"model": "another"}), "measure this head"),
        (json.dumps(BENCH | {"runs": [PLAIN]}), "no run of an eagle engine"),
        (json.dumps(BENCH | {"runs": [DRAFTED | {"forced_acceptance": 3}]}), "forced acceptance"),
        ('{"runs": 3}', "is no bench file"),
        ("[1]", "is no bench file"),
        ("{", "is no bench file"),
    ],
    ids=["target", "no-head", "forced", "runs", "list", "cut"],
)
def test_numbers_of_something_else_are_refused(tmp_path, llama, command, bench, said):
    code, error, packed = pack(command, tmp_path, llama, bench)
    assert code == 1 and said in error and not packed.exists()
