"""Defaults <- YAML <- `key=value`: one merge, one validation, one-line errors.

Knows nothing of what the values mean; that is `schema.py`.
"""

from __future__ import annotations

import difflib
import typing
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from configs.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def load_config(
    cls: type[Config],
    source: str | Path | None = None,
    overrides: typing.Iterable[str] = (),
    flags: dict[str, Any] | None = None,
) -> Config:
    """Build a `cls` from its defaults, a YAML file or preset name, and `key=value` strings.

    `flags` maps dotted keys to values taken as they are (what `--data PATH` was given); None means
    not given. Order: defaults, file, flags, overrides; later ones win. Raises `ConfigError` (one
    line) for an unknown key, a bad value or file.
    """
    merged = OmegaConf.create(cls().model_dump(mode="json"))
    try:
        if source is not None:
            merged = OmegaConf.merge(merged, _read_yaml(cls, source))
        for key, value in (flags or {}).items():
            if value is not None:
                OmegaConf.update(merged, key, value, merge=False)
        for override in overrides:
            merged = OmegaConf.merge(merged, _read_override(cls, override))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {_first_line(error)}") from error
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error)) from error


def preset_names() -> list[str]:
    """Names that `--config` takes besides files."""
    found = (files("configs") / "presets").iterdir()
    return sorted(item.name[: -len(".yaml")] for item in found if item.name.endswith(".yaml"))


def _read_yaml(cls: type[BaseModel], source: str | Path) -> Any:
    name = str(source)
    path = Path(name).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot read this config: {_first_line(error)}") from error
    elif name in preset_names():
        text = (files("configs") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        presets = ", ".join(preset_names())
        raise ConfigError(f"config {name!r} is neither a file nor a preset (presets: {presets})")
    try:
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        tree = OmegaConf.to_container(loaded)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{name}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: must hold sections such as 'train:', not a list or a word")
    _reject_unknown(cls, tree, prefix="", where=f"{name}: ")
    return loaded


def _read_override(cls: type[BaseModel], override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is not an override: write section.key=value")
    try:
        loaded = OmegaConf.from_dotlist([override])
        tree = OmegaConf.to_container(loaded)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = _first_line(error)
        raise ConfigError(f"{override!r}: cannot read the value: {reason}") from error
    _reject_unknown(cls, tree, prefix="", where="")
    return loaded


def _reject_unknown(cls: type[BaseModel], tree: dict, prefix: str, where: str) -> None:
    """Walk `tree` beside the schema; the first key the schema lacks is the error."""
    for key, value in tree.items():
        field = cls.model_fields.get(str(key))
        if field is None:
            raise ConfigError(where + _unknown(cls, str(key), prefix))
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            if not isinstance(value, dict):
                keys = ", ".join(section.model_fields)
                name = f"{where}{prefix}{key}"
                raise ConfigError(f"{name} is a section: set one of its keys ({keys})")
            _reject_unknown(section, value, f"{prefix}{key}.", where)
        elif isinstance(value, dict) and not _takes_mapping(field.annotation):
            raise ConfigError(f"{where}{prefix}{key} is a single value and has no keys below it")


def _takes_mapping(annotation: Any) -> bool:
    """True for `SomeModel | None`: a value that may be written as a mapping."""
    inner = typing.get_args(annotation)
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in inner)


def _unknown(cls: type[BaseModel], key: str, prefix: str) -> str:
    known = list(cls.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        hint = f"; did you mean {prefix}{near[0]}?"
    else:
        places = [f"{prefix}{s}.{key}" for s in known if key in _keys_of(cls, s)]
        hint = f"; did you mean {' or '.join(places)}?" if places else ""
    of = f"keys of {prefix[:-1]}" if prefix else "sections"
    return f"unknown config key {prefix}{key}{hint} ({of}: {', '.join(known)})"


def _keys_of(cls: type[BaseModel], name: str) -> list[str]:
    section = cls.model_fields[name].annotation
    is_section = isinstance(section, type) and issubclass(section, BaseModel)
    return list(section.model_fields) if is_section else []


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """First problem as `key=value: reason (what the key is)`, plus how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    key, description = _locate(cls, first["loc"])
    reason = first["msg"]
    for prefix in ("Value error, ", "Input "):
        reason = reason[len(prefix) :] if reason.startswith(prefix) else reason
    if first["type"] in ("missing", "extra_forbidden"):
        shown = key
        reason = "unknown key" if first["type"] == "extra_forbidden" else "required, but not given"
    elif isinstance(first["input"], (dict, BaseModel)) or not key:
        shown = key or "config"
    else:
        shown = f"{key}={first['input']}"
    others = {_locate(cls, problem["loc"])[0] for problem in problems[1:]} - {key}
    more = f"; {len(others)} more wrong: {', '.join(sorted(others))}" if others else ""
    return f"{shown}: {reason}" + (f" ({description})" if description else "") + more


def _locate(cls: type[BaseModel], loc: tuple) -> tuple[str, str]:
    """Dotted key and description; drops the union tags that pydantic puts into `loc`."""
    names, description, section = [], "", cls
    for part in loc:
        if isinstance(part, int):
            names.append(str(part))
            continue
        field = section.model_fields.get(part) if section else None
        if field is None:
            if section is None and part.isidentifier() and part not in _UNION_TAGS:
                names.append(part)
            continue
        names.append(part)
        annotation = field.annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation if is_section else None
        description = "" if is_section else field.description or ""
    return ".".join(names), description


_UNION_TAGS = {"str", "int", "float", "bool", "list", "tuple", "none"}


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
