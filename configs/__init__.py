"""Typed configs, their loading from YAML and `key=value`, and the DeepSpeed presets.

Knows nothing of torch, models or data."""

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import HeadTrainConfig

__all__ = ["ConfigError", "HeadTrainConfig", "load_config"]
