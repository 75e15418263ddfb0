"""Heads of other projects: names and fields as they write them, no bit lost, nothing read wrongly
in silence."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from engine_helpers import make_head, make_prompts, stock_greedy
from format_tables import (
    CONFIGS,
    EAGLE1,
    ENTERING,
    LLAMA,
    PUBLISHED,
    TENSORS,
    D,
    H,
    V,
    fill,
    publish,
    published,
    without,
)
from safetensors.torch import load_file

from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.files import same_bits
from eagle.heads import configs, write
from eagle.heads.head import HeadConfig
from eagle.heads.head import make_head as new_head
from eagle.heads.read import read_folder
from eagle.heads.tables import TABLE
from eagle.heads.write import export_head
from eagle.model import EMBEDDED_HEAD, EaModel

FORMATS = list(TABLE)
OPTIONS = yaml.safe_load(Path(__file__).with_name("kinds.yaml").read_text("utf-8"))["formats"]
VERIFIER = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
SIZES = pytest.mark.parametrize("draft_vocab", [D, V], ids=["reduced", "full"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def a_head(llama, draft_vocab=D, dtype=torch.float32, **options):
    head = make_head(llama, draft_vocab)
    values = {**head.config.to_dict(), "feature_layers": tuple(ENTERING), **options}
    torch.manual_seed(3)
    again = new_head(HeadConfig(**values)).to(dtype).eval()
    again.set_draft_vocab(torch.randperm(V)[:draft_vocab])
    return again


def read(folder, target=None, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_head(folder, target, **how)[0]


@SIZES
@DTYPES
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_what_the_project_writes(tmp_path, llama, name, dtype, draft_vocab):
    head = a_head(llama, draft_vocab, dtype)
    folder = export_head(head, tmp_path / name, name, {"target": {"id": "some/target"}}, VERIFIER)
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    expected = TENSORS[name][draft_vocab == V]
    written = load_file(folder / "model.safetensors")
    assert {k: (tuple(v.shape), v.dtype) for k, v in written.items()} == {
        k: (shape, kinds.get(k, dtype)) for k, shape in expected.items()
    }
    text = json.dumps(CONFIGS[name] | {"draft_vocab_size": draft_vocab})
    text = text.replace("float32", str(dtype).split(".")[-1])
    assert json.loads((folder / "config.json").read_text()) == json.loads(text)


@SIZES
@DTYPES
def test_round_trip_through_every_format_is_bit_equal(tmp_path, llama, dtype, draft_vocab):
    head = a_head(llama, draft_vocab, dtype)
    record = {"target": {"id": "some/target", "fingerprint": "0" * 64}, "training": {"step": 7}}
    first = save_head(head, tmp_path / "eagle", record)
    folder = first
    for name in ("sglang", "vllm", "modelopt", "eagle"):
        head, kept = load_head(folder)
        assert kept["target"] == record["target"]
        folder = export_head(head, tmp_path / f"to-{name}", name, kept)
        assert read_folder(folder).format.name == name
    for file in ("model.safetensors", "config.json", "eagle.json"):
        assert (folder / file).read_bytes() == (first / file).read_bytes(), file


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_heads_load_and_generate_losslessly(tmp_path, llama, case):
    folder = published(tmp_path / case, case)
    head = read(folder, llama)
    tensors = fill(PUBLISHED[case][0])
    layer = "layers.0." if case.startswith(("vllm", "modelopt")) else "midlayer."
    for key, value in head.state_dict().items():
        key = key.replace("midlayer.", layer)
        assert key == "t2d" or same_bits(value, tensors[key]), key
    # the eagle-bin names none: SafeAILab's choice for a model of 4 layers, kept distinct
    layers = {"eagle-bin": (1, 2, 4)}.get(case, (-1,) if "eagle1" in case else tuple(ENTERING))
    assert head.config.feature_layers == layers
    model = EaModel(llama, head, "12,3,3")
    prompts = make_prompts((5, 9))
    for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=20).rows, strict=True):
        assert row.tokens == stock_greedy(llama, prompt, 20), case


def test_the_older_speculators_default_is_vllms_and_said(tmp_path, llama):
    folder = published(tmp_path / "older", "vllm-older")
    assert not load_head(folder, llama)[0].config.norm_before_residual
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(without(config, "norm_before_residual")))
    with pytest.warns(UserWarning, match="vLLM takes true"):
        assert load_head(folder, llama)[0].config.norm_before_residual
    flat = published(tmp_path / "flat", "vllm-flat")  # vLLM's default for these is the other one
    assert not load_head(flat, llama)[0].config.norm_before_residual


def test_the_targets_own_embedding_is_left_out(tmp_path, llama):
    """EAGLE-1 files hold a copy of the target's."""
    tensors = fill(EAGLE1)
    tensors["embed_tokens.weight"] = llama.embed.weight.detach().clone()
    folder = publish(tmp_path / "copy", tensors, without(LLAMA, "head_dim"))
    assert not load_head(folder, llama)[0].config.own_embedding
    tensors["embed_tokens.weight"][5, 5] += 1
    folder = publish(tmp_path / "own", tensors, without(LLAMA, "head_dim"))
    assert load_head(folder, llama)[0].config.own_embedding


def test_an_output_layer_tied_to_the_embedding(tmp_path, llama):
    tensors = fill(TENSORS["sglang"][1] | {"embed_tokens.weight": (V, H)})
    del tensors["lm_head.weight"]
    config = CONFIGS["sglang"] | {"draft_vocab_size": V, "tie_word_embeddings": True}
    head, _ = load_head(publish(tmp_path / "tied", tensors, config), llama)
    assert same_bits(head.lm_head.weight, tensors["embed_tokens.weight"])
    head.lm_head.weight = head.embed_tokens.weight  # one memory, which safetensors refuses
    again, _ = load_head(save_head(head, tmp_path / "again"), llama)
    assert same_bits(again.lm_head.weight, head.lm_head.weight)
    assert same_bits(again.embed_tokens.weight, head.lm_head.weight)


@pytest.mark.parametrize("case", FORMATS)
def test_every_wrong_key_is_named(tmp_path, llama, case):
    shapes, config, _ = PUBLISHED[case]
    layer = "layers.0." if case in ("vllm", "modelopt") else "midlayer."
    tensors = fill(without(shapes, "norm.weight", layer + "mlp.up_proj.weight"))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].clone()
    tensors |= {"extra.weight": torch.zeros(2), "layers.9.weight": torch.zeros(2)}
    with pytest.raises(EagleError) as error:
        load_head(publish(tmp_path / case, tensors, config), llama)
    said = str(error.value)
    assert f"missing: {layer}mlp.up_proj.weight, norm.weight;" in said
    assert "left over: extra.weight, layers.9.weight;" in said
    assert f"lm_head.weight [{D}, {H - 1}] instead of [{D}, {H}]" in said


@pytest.mark.parametrize("case", ["eagle1-bin", "modelopt"])
def test_a_map_that_is_none_is_refused(tmp_path, llama, case):
    shapes, config, _ = PUBLISHED[case]
    tensors = fill(shapes)
    if case == "modelopt":
        tensors["d2t"] = tensors["d2t"] + torch.arange(D)  # target ids in place of offsets
        said = "offsets"
    else:
        tensors["d2t"] = torch.ones(V, dtype=torch.int64)
        said = "left over: d2t"
    with pytest.raises(EagleError, match=said):
        load_head(publish(tmp_path / case, tensors, config), llama)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_never_executed(tmp_path, llama, capsys):
    folder = publish(tmp_path / "bad", {"fc.weight": Payload()}, CONFIGS["eagle"], "bin")
    with pytest.raises(EagleError, match="no plain weights"):
        load_head(folder, llama)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("case", FORMATS)
def test_absent_layer_ids(tmp_path, llama, case):
    """One implementation defines the eagle format, and it knows one choice; elsewhere it is a
    guess."""
    folder = published(tmp_path / case, case)
    config = json.loads((folder / "config.json").read_text())
    config = without(config, configs.IDS, configs.IDS_CONVENTION)
    if "eagle_config" in config:
        del config["eagle_config"][configs.IDS]
    (folder / "config.json").write_text(json.dumps(config))
    known = case == "eagle"
    for target in [None] if known else [None, llama]:
        with pytest.raises(EagleError, match="--probe.*entering:.*output:.*one-based:"):
            load_head(folder, target)
    assert not known or load_head(folder, llama)[0].config.feature_layers == (1, 2, 4)
    readings = {"entering": (1, 2, 3), "output": (2, 3, 4), "one-based": (0, 1, 2)}
    for convention, layers in readings.items():
        head, _ = load_head(folder, llama, layer_ids=(1, 2, 3), convention=convention)
        assert head.config.feature_layers == layers


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_kept_or_refused(tmp_path, llama, option):
    values, run_by = OPTIONS[option]
    head = a_head(llama, **values)
    again, _ = load_head(save_head(head, tmp_path / "own"), llama)
    assert again.config == head.config
    for name in FORMATS:
        if name in run_by:
            folder = export_head(head, tmp_path / name, name, verifier=VERIFIER)
            again, _ = load_head(folder, llama)
            assert again.config == head.config
            for key, value in head.state_dict().items():
                assert same_bits(again.state_dict()[key], value), (name, key)
        else:
            with pytest.raises(EagleError, match="no place for this head's .*; (use --to|no pub)"):
                export_head(head, tmp_path / name, name, verifier=VERIFIER)
            assert not (tmp_path / name).exists()


def test_what_upstream_eagle_reads_of_a_config(tmp_path, llama):
    """Where target_hidden_size stands, its cnets.py leaves the embedding random unless the file
    holds one; its config takes a rope_scaling of two fields alone."""
    for option, stands in (({}, False), ({"own_embedding": True}, True)):
        head = a_head(llama, **option)
        for folder in (
            save_head(head, tmp_path / f"own-{stands}"),
            export_head(head, tmp_path / f"export-{stands}", "eagle"),
        ):
            config = json.loads((folder / "config.json").read_text())
            tensors = load_file(folder / "model.safetensors")
            assert ("target_hidden_size" in config) == stands == ("embed_tokens.weight" in tensors)
    shipped = json.loads((EMBEDDED_HEAD / "config.json").read_text())
    assert "target_hidden_size" not in shipped
    head = a_head(llama, rope_scaling={"rope_type": "linear", "factor": 2})
    folder = export_head(head, tmp_path / "linear", "eagle")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_eagle1_heads_keep_their_format(tmp_path, llama):
    config = HeadConfig.for_target(llama.config, method="eagle1")
    head = new_head(config).eval()
    folder = export_head(head, tmp_path / "eagle", "eagle")
    written = load_file(folder / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in written.items()} == without(EAGLE1, "embed_tokens.weight")
    assert load_head(folder, llama)[0].config == config
    with pytest.raises(EagleError, match="no place for this head's method"):
        export_head(head, tmp_path / "vllm", "vllm")


def forgetful(*arguments):
    return configs.write_config(*arguments) | {"norm_before_residual": True}


def scaled(config, state, fmt):
    return {k: v * 2 if k == "lm_head.weight" else v for k, v in state.items()}


@pytest.mark.parametrize(
    "name, function, to, said",
    [
        ("write_config", forgetful, "vllm", "another head"),
        ("to_theirs", scaled, "eagle", "other logits"),
    ],
)
def test_a_folder_that_reads_back_differently_is_not_written(
    tmp_path, llama, monkeypatch, name, function, to, said
):
    monkeypatch.setattr(write, name, function)
    with pytest.raises(EagleError, match=f"{said}.*nothing is written"):
        export_head(a_head(llama), tmp_path / to, to, verifier=VERIFIER)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"speculators_model_type": "dflash"}, "speculator of type 'dflash'"),
        ({"transformer_layer_config": {**LLAMA, "model_type": "mistral"}}, "type 'mistral'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "three ids"),
    ],
    ids=["algorithm", "layers", "quantized", "ids"],
)
def test_other_kinds_of_heads_are_refused(tmp_path, llama, change, said):
    folder = publish(tmp_path / "head", fill(TENSORS["vllm"][0]), CONFIGS["vllm"] | change)
    with pytest.raises(EagleError, match=said):
        load_head(folder, llama)


def test_names_that_say_nothing_need_a_format(tmp_path, llama):
    shapes, config, _ = PUBLISHED["modelopt"]
    folder = publish(tmp_path / "head", fill(shapes), without(config, "eagle_config"))
    with pytest.raises(EagleError, match="give --from"):
        load_head(folder, llama)
    head, _ = load_head(folder, llama, format="modelopt", layer_ids=[0, 1, 2], convention="output")
    assert head.config.feature_layers == tuple(ENTERING)
    config = config | {"eagle_config": config["eagle_config"] | {"parallel_draft_step": 2}}
    folder = publish(tmp_path / "parallel", fill(shapes), config)
    with pytest.raises(EagleError, match="parallel_draft_step=2"):
        load_head(folder, llama)
