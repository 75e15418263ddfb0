"""How every command of ours reads its arguments and reports errors.

`main(fn)` runs a function as a command through fire, after making the command line unambiguous:
positional `key=value` overrides stay strings wherever they stand, flags are converted by their
annotation, and unknown flags are refused before any work starts. Knows nothing of the commands.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from configs.errors import ConfigError

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")
# older or other names of a flag: the target is the base of its head
_ALIASES = {"model": "base", "base": "target"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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
    import fire
    from fire import decorators

    flags = _flags(fn)
    if "--help" in argv or "-h" in argv:
        print(_help(fn, flags, name))
        return 0
    takes_overrides = _takes_overrides(fn)
    positional, named = _normalise(argv, flags, takes_overrides)
    readers = {flag: functools.partial(_read, flag, kinds) for flag, (kinds, _) in flags.items()}
    result: list[Any] = []

    @functools.wraps(fn)
    def command(*args: str, **kwargs: Any) -> None:
        result.append(fn(*args, **kwargs))

    decorators.SetParseFn(str)(command)
    decorators.SetParseFns(**readers)(command)
    fire.Fire(command, command=[*positional, *named], name=name)
    return result[0] if result else 0


def _takes_overrides(fn: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(fn).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _flags(fn: Callable[..., Any]) -> dict[str, tuple[set[type], Any]]:
    """Flag name -> (types it may have, default)."""
    try:
        hints = typing.get_type_hints(fn)
    except (NameError, TypeError):
        hints = {}
    flags = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: make flags keyword-only"
        default = parameter.default
        if name in hints:
            hint = hints[name]
            union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            kinds = set(typing.get_args(hint)) if union else {hint}
        else:
            kinds = {type(default) if isinstance(default, (bool, int, float)) else str}
        flags[name] = (kinds - {type(None)}, default)
    return flags


def _normalise(
    argv: list[str], flags: dict[str, tuple[set[type], Any]], takes_overrides: bool
) -> tuple[list[str], list[str]]:
    """Split into overrides and `--flag=value` strings, so that nothing is left to guess."""
    positional: list[str] = []
    named: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument in ("-", "--"):
            if not takes_overrides or argument in ("-", "--"):
                hint = f" (flags: {', '.join('--' + f for f in flags)})" if flags else ""
                raise ConfigError(f"unexpected argument {argument!r}{hint}")
            positional.append(argument)
            continue
        name, equals, value = _split(argument, flags)
        if name not in flags and name.startswith("no") and not equals:
            bare = name[2:].lstrip("_")
            if bare in flags and bool in flags[bare][0]:
                named[bare] = "false"
                continue
        if name not in flags:
            raise ConfigError(_unknown_flag(argument, name, flags, takes_overrides))
        if not equals:
            value = _take_value(argument, flags[name][0], rest, flags)
        named[name] = value
    return positional, [f"--{name}={value}" for name, value in named.items()]


def _split(argument: str, flags: dict) -> tuple[str, str, str]:
    """--flag=value -> the flag's own name, "=", value."""
    name, equals, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    alias = _ALIASES.get(name)
    return alias if name not in flags and alias in flags else name, equals, value


def _take_value(argument: str, kinds: set[type], rest: list[str], flags: dict) -> str:
    """The flag's value: the next argument, or true where the flag may stand alone."""
    following = rest[0] if rest else None
    is_flag = following is not None and re.match(r"^--?[A-Za-z]", following) is not None
    if bool in kinds:
        alone = following is None or is_flag or _OVERRIDE.match(following) is not None
        only_bool = kinds == {bool}
        if alone or (only_bool and following.lower() not in _BOOLS):
            return "true"
        return rest.pop(0)
    known = is_flag and _split(following, flags)[0] in flags
    if following is None or known:
        raise ConfigError(f"{argument} needs a value: {argument} VALUE or {argument}=VALUE")
    return rest.pop(0)


def _unknown_flag(argument: str, name: str, flags: dict, takes_overrides: bool) -> str:
    shown = "--" + name
    near = difflib.get_close_matches(name, flags, n=1)
    if near:
        hint = f"; did you mean --{near[0]}?"
    elif takes_overrides and "." in name:
        hint = f"; write overrides without dashes: {argument.lstrip('-')}"
    else:
        hint = ""
    return f"unknown flag {shown}{hint} (flags: {', '.join('--' + flag for flag in flags)})"


def _read(flag: str, kinds: set[type], text: str) -> Any:
    """Text -> the first of bool, int, float, str that the flag may be and the text is."""
    if bool in kinds and text.lower() in _BOOLS and (int not in kinds or text not in "01"):
        return _BOOLS[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds or not kinds & {bool, int, float}:
        return text
    wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
    raise ConfigError(f"--{flag}={text}: must be {wanted}")


def _help(fn: Callable[..., Any], flags: dict, name: str | None) -> str:
    prog = name or os.path.basename(sys.argv[0])
    usage = f"usage: {prog} [--flag value ...]" + (
        " [section.key=value ...]" if _takes_overrides(fn) else ""
    )
    lines = [usage, "", inspect.getdoc(fn) or "", "", "flags:"]
    for flag, (kinds, default) in flags.items():
        kind = "|".join(sorted(getattr(kind, "__name__", str(kind)) for kind in kinds))
        required = default is inspect.Parameter.empty
        shown = " (required)" if required else "" if default is None else f" (default: {default})"
        lines.append(f"  --{flag} {kind.upper()}{shown}")
    return "\n".join(lines)
