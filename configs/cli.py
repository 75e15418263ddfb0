"""How every command of ours reads its arguments and reports errors.

`main(fn)` runs a function as a command: `key=value` overrides stay strings wherever they stand,
flags are converted by their annotation, unknown flags are refused before any work starts.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from configs.errors import ConfigError

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")
# older or other names of a flag: the target is the base of its head
_ALIASES = {"model": "base", "base": "target"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class _Flag(NamedTuple):
    kinds: set[type]
    default: Any


def main(fn: Callable[..., Any], argv: list[str] | None = None, name: str | None = None) -> None:
    """Run `fn` on `argv` (default: the process's) and exit with its code.

    `fn(*overrides: str, flag=default, ...)`: parameters after `*overrides` become `--flag value`;
    annotations (`int`, `float`, `bool`, `str`, any `| None`) decide how a value is read, and a
    parameter that may be `bool` also works without a value. An `int` result is the exit code.
    """
    sys.exit(run(lambda: _call(fn, sys.argv[1:] if argv is None else argv, name)))


def run(body: Callable[[], Any]) -> int:
    """Call `body`; turn user-caused errors into one stderr line. Returns the exit code."""
    try:
        result = body()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away (`| head`); keep the interpreter's exit quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        if not getattr(error, "user_error", False):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _call(fn: Callable[..., Any], argv: list[str], name: str | None) -> Any:
    hints, flags, takes_overrides = typing.get_type_hints(fn), {}, False
    for flag, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            takes_overrides = True
            continue
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{flag}: make flags keyword-only"
        hint = hints.get(flag, type(parameter.default))
        kinds = set(typing.get_args(hint) or [hint]) - {type(None)}
        flags[flag] = _Flag(kinds, parameter.default)
    if "--help" in argv or "-h" in argv:
        print(_help(fn, flags, takes_overrides, name or os.path.basename(sys.argv[0])))
        return 0
    overrides, given = _parse(argv, flags, takes_overrides)
    for flag, (_, default) in flags.items():
        if default is inspect.Parameter.empty and flag not in given:
            raise ConfigError(f"give --{flag} VALUE")
    return fn(*overrides, **given)


def _parse(argv: list[str], flags: dict[str, _Flag], takes_overrides: bool) -> tuple[list, dict]:
    """The overrides, and the flags' values."""
    overrides: list[str] = []
    given: dict[str, Any] = {}
    known, rest = f"(flags: {', '.join('--' + flag for flag in flags)})", list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, text = _split(argument, flags)
        switched = name.removeprefix("no").lstrip("_")
        if not argument.startswith("-") and takes_overrides:
            overrides.append(argument)
        elif not argument.startswith("-") or argument in ("-", "--"):
            raise ConfigError(f"unexpected argument {argument!r} {known}")
        elif name in flags:
            kinds = flags[name].kinds
            given[name] = _read(
                name, kinds, text if equals else _value(argument, kinds, rest, flags)
            )
        elif not equals and name[:2] == "no" and bool in flags.get(switched, _Flag(set(), 0)).kinds:
            given[switched] = False
        else:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            if takes_overrides and "." in name and not near:
                hint = f"; write overrides without dashes: {argument.lstrip('-')}"
            raise ConfigError(f"unknown flag --{name}{hint} {known}")
    return overrides, given


def _split(argument: str, flags: dict[str, _Flag]) -> tuple[str, str, str]:
    """--flag=value -> the flag's own name, "=", value."""
    name, equals, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    alias = _ALIASES.get(name)
    return alias if name not in flags and alias in flags else name, equals, value


def _value(argument: str, kinds: set[type], rest: list[str], flags: dict[str, _Flag]) -> str:
    """The flag's value: the next argument, or true where the flag may stand alone."""
    following = rest[0] if rest else None
    is_flag = following is not None and re.match(r"^--?[A-Za-z]", following) is not None
    if bool in kinds:
        alone = following is None or is_flag or _OVERRIDE.match(following) is not None
        if alone or (kinds == {bool} and following.lower() not in _BOOLS):
            return "true"
    elif following is None or (is_flag and _split(following, flags)[0] in flags):
        raise ConfigError(f"{argument} needs a value: {argument} VALUE or {argument}=VALUE")
    return rest.pop(0)


def _read(flag: str, kinds: set[type], text: str) -> Any:
    """Text -> the first of bool, int, float, str that the flag may be and the text is."""
    if bool in kinds and text.lower() in _BOOLS and (int not in kinds or text not in "01"):
        return _BOOLS[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            if kind in kinds:
                return kind(text)
    if str in kinds or not kinds & {bool, int, float}:
        return text
    wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
    raise ConfigError(f"--{flag}={text}: must be {wanted}")


def _help(fn: Callable[..., Any], flags: dict, takes_overrides: bool, prog: str) -> str:
    positional = " [section.key=value ...]" if takes_overrides else ""
    lines = [f"usage: {prog} [--flag value ...]{positional}", "", inspect.getdoc(fn) or ""]
    lines += ["", "flags:"]
    for flag, (kinds, default) in flags.items():
        kind = "|".join(sorted(getattr(kind, "__name__", str(kind)) for kind in kinds))
        shown = "" if default is None else f" (default: {default})"
        shown = " (required)" if default is inspect.Parameter.empty else shown
        lines.append(f"  --{flag} {kind.upper()}{shown}")
    return "\n".join(lines)
