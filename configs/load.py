"""Defaults <- YAML <- `key=value`: one merge, one validation, one-line errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from configs.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
_UNION_TAGS = {"str", "int", "float", "bool", "list", "tuple", "none"}


def load_config(
    cls: type[Config],
    source: str | Path | None = None,
    overrides: Iterable[str] = (),
    flags: dict[str, Any] | None = None,
    folder: str = "",
) -> Config:
    """Build a `cls` from its defaults, a YAML file or preset name, and `key=value` strings.

    `flags` maps dotted keys to values taken as they are (what `--data PATH` was given); None means
    not given. Order: defaults, file, flags, overrides; later ones win. `folder` of the presets has
    the names. Raises `ConfigError` (one line) for an unknown key, a bad value or file."""
    merged = OmegaConf.create(cls().model_dump(mode="json"))
    given = OmegaConf.create({}) if source is None else _read_yaml(str(source), folder)
    try:
        merged = OmegaConf.merge(merged, given)
        for key, value in (flags or {}).items():
            if value is not None:
                OmegaConf.update(merged, key, value, merge=False)
        for override in overrides:
            merged = OmegaConf.merge(merged, _read_override(override))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"config: {_first_line(error)}") from error
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error, str(source), given)) from error


def preset_names(folder: str = "") -> list[str]:
    """Names that `--config` takes besides files."""
    found = (files("configs") / "presets" / folder).iterdir()
    return sorted(item.name[: -len(".yaml")] for item in found if item.name.endswith(".yaml"))


def _read_yaml(name: str, folder: str) -> Any:
    path = Path(name).expanduser()
    if not path.is_file():
        if name not in preset_names(folder):
            known = ", ".join(preset_names(folder))
            raise ConfigError(f"config {name!r} is neither a file nor a preset (presets: {known})")
        path = files("configs") / "presets" / folder / f"{name}.yaml"
    try:
        loaded = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{name}: must hold sections such as 'train:', not a list or a word")
    return loaded


def _read_override(override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is not an override: write section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{override!r}: cannot read the value: {_first_line(error)}") from error


def _explain(cls: type[BaseModel], error: ValidationError, source: str, given: Any) -> str:
    """First problem as `key=value: reason (what the key is)`, plus how many more there are."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key, section, description = _locate(cls, first["loc"])
    if first["type"] == "extra_forbidden":
        said = _unknown(section, key)
        if OmegaConf.select(given, key) is not None:
            said = f"{source}: {said}"
    else:
        whole = isinstance(first["input"], (dict, BaseModel))
        shown = key or "config" if whole else f"{key}={first['input']}"
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        said = f"{shown}: {reason}" + (f" ({description})" if description else "")
    others = {_locate(cls, problem["loc"])[0] for problem in problems[1:]} - {key}
    return said + (f"; {len(others)} more wrong: {', '.join(sorted(others))}" if others else "")


def _locate(cls: type[BaseModel], loc: tuple) -> tuple[str, type[BaseModel] | None, str]:
    """Dotted key, the section in which its last part is, if any, and the key's description; drops
    the union tags that pydantic puts into `loc`."""
    names, description, inside, section = [], "", None, cls
    for part in loc:
        field = section.model_fields.get(part) if section else None
        named = isinstance(part, int) or (part.isidentifier() and part not in _UNION_TAGS)
        if not section and not named:
            continue
        names.append(str(part))
        inside, section = section, _section(field)
        description = "" if section or not field else field.description or ""
    return ".".join(names), inside, description


def _section(field: Any) -> type[BaseModel] | None:
    kind = getattr(field, "annotation", None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _unknown(section: type[BaseModel] | None, key: str) -> str:
    if section is None:  # in a list of sections
        return f"{key}: unknown key"
    *above, name = key.split(".")
    prefix, known = "".join(part + "." for part in above), list(section.model_fields)
    near = [prefix + n for n in difflib.get_close_matches(name, known, n=1, cutoff=0.6)]
    near = near or [prefix + n for n in within(section, name)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    of = f"keys of {prefix[:-1]}" if prefix else "sections"
    return f"unknown config key {key}{hint} ({of}: {', '.join(known)})"


def within(cls: type[BaseModel], name: str) -> list[str]:
    """Keys called `name` in the sections of a config: section.name."""
    sections = ((place, _section(field)) for place, field in cls.model_fields.items())
    return [f"{place}.{name}" for place, s in sections if name in getattr(s, "model_fields", ())]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
