from pathlib import Path

import pytest
import yaml

from configs import ConfigError, HeadTrainConfig, load_config
from configs.deepspeed_presets import deepspeed_config
from configs.load import preset_names

REFUSED = yaml.safe_load((Path(__file__).parents[1] / "data/refused.yaml").read_text("utf-8"))


def load(*overrides, source=None, flags=None):
    return load_config(HeadTrainConfig, source, overrides, flags)


def test_order_is_defaults_file_flags_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 0.5, max_steps: 3, batch_size: 2}\ndata: {format: chat}\n")
    cfg = load("train.max_steps=20", source=path, flags={"data.format": "plain", "data.path": None})
    assert (cfg.train.lr, cfg.train.max_steps, cfg.train.batch_size) == (0.5, 20, 2)
    assert cfg.data.format == "plain" and cfg.train.grad_accum == 1


def test_override_values():
    cfg = load(
        "train.lr=1e-4",
        "loss.name=focal",
        "data.path=a,b",
        "model.base=123",
        "eval.tree=8,4,2",
        "train.max_steps=null",
        "model.feature_layers=[2,8,13]",
        "train.resume=true",
        "data.format=mixed",
        "data.path=null",
        "data.mixture=[{format: fim, weight: 2}]",
    )
    assert cfg.train.lr == 1e-4 and cfg.loss.name == "focal" and cfg.model.base == "123"
    assert cfg.eval.tree == "8,4,2" and cfg.train.max_steps is None
    assert cfg.model.feature_layers == (2, 8, 13) and cfg.train.resume == "auto"
    assert cfg.data.mixture[0].weight == 2
    assert load("data.path=a,b").data.paths == ["a", "b"]
    odd = "dir/a: {b}"
    assert load(flags={"data.path": odd}).data.paths == [odd]


@pytest.mark.parametrize("override, message", REFUSED["overrides"].items())
def test_errors_are_one_line_with_the_remedy(override, message):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert error.value.user_error


def test_several_problems_are_counted():
    with pytest.raises(ConfigError, match="1 more wrong: train.zero"):
        load("train.lr=-1", "train.zero=9")


@pytest.mark.parametrize("text, message", REFUSED["yaml_files"].items())
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(source=path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_presets_load_and_unknown_names_list_them():
    assert {"demo", "mixed", "embedded_head"} <= set(preset_names())
    for name in preset_names():
        load(source=name)
    assert load(source="demo").train.time_budget_minutes == 2.5
    with pytest.raises(ConfigError, match="presets: demo"):
        load(source="nope")


@pytest.mark.parametrize("zero", range(4))
def test_deepspeed_presets(zero):
    cfg = load(f"train.zero={zero}", "train.batch_size=3", "train.grad_accum=2", "train.lr=0.25")
    filled = deepspeed_config(cfg, world_size=4)
    assert filled["zero_optimization"]["stage"] == zero and filled["train_batch_size"] == 24
    assert filled["optimizer"]["params"]["torch_adam"]
    assert "bf16" not in filled  # weights are fp32, what computes in bf16 is autocast
    assert filled["optimizer"]["params"]["lr"] == 0.25 and "scheduler" not in filled
    assert "auto" not in str(filled)
