"""How every command of ours reads its arguments and reports errors.

`main(fn)` runs a function as a command: `key=value` overrides stay strings wherever they stand,
flags are converted by their annotation, unknown flags are refused before any work starts."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from configs.errors import ConfigError
from configs.load import within
from configs.schema import HeadTrainConfig

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")
# the target is the base of its head; a parameter cannot be called `from`
_OTHER_NAMES = {"base": "model", "target": "base", "from_format": "from"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def main(fn: Callable[..., Any], argv: list[str] | None = None, name: str | None = None) -> None:
    """Run `fn` on `argv` (default: the process's) and exit with its code.

    `fn(*overrides: str, flag=default, ...)`: parameters after `*overrides` become `--flag value`,
    read by their annotation (`int`, `float`, `bool`, `str`, any `| None`); one that may be `bool`
    also works without a value. An `int` result is the exit code; user-caused errors are one line.
    `fn.config` is the config that overrides change (default: of head training), for hints.
    """
    try:
        result = _call(fn, sys.argv[1:] if argv is None else argv, name)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader went away (`| head`); keep the interpreter's exit quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ValueError as error:
        if not getattr(error, "user_error", False):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(result if isinstance(result, int) and not isinstance(result, bool) else 0)


def choose(
    commands: dict[str, Callable[..., Any]], doc: str, name: str, argv: list[str] | None = None
) -> None:
    """Run the command that `argv` names first; without one that is known, show `doc` or names."""
    chosen, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if chosen not in commands:
        wanted = chosen in ("-h", "--help")
        said = doc if wanted else f"error: name a command: {', '.join(commands)}"
        print(said, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    main(commands[chosen], arguments, f"{name} {chosen}")


def _call(fn: Callable[..., Any], argv: list[str], name: str | None) -> Any:
    parameters, hints = dict(inspect.signature(fn).parameters), typing.get_type_hints(fn)
    variadic = [p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    takes_overrides = bool(variadic and parameters.pop(variadic[0]))
    usage = "%(prog)s [--flag value ...]" + " [section.key=value ...]" * takes_overrides
    parser = _Parser(
        prog=name,
        usage=usage,
        description=inspect.getdoc(fn),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    alone: dict[str, set[type]] = {}  # flags that need no value
    for flag, parameter in parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{flag}: make flags keyword-only"
        default, hint = parameter.default, hints.get(flag, type(parameter.default))
        kinds = set(typing.get_args(hint) or [hint]) - {type(None)}
        other, required = _OTHER_NAMES.get(flag), default is inspect.Parameter.empty
        names = [f"--{n}" for n in (flag, other) if n and (n == flag or n not in parameters)]
        parser.add_argument(
            *names,
            type=partial(_read, kinds),
            metavar="|".join(sorted(getattr(kind, "__name__", kind).upper() for kind in kinds)),
            help=None if default is None else "(required)" if required else f"(default: {default})",
        )
        alone |= dict.fromkeys(names if bool in kinds else (), kinds)
    given, rest = parser.parse_known_args(_spelled(argv, alone, parameters))
    known = f"(flags: {', '.join('--' + flag for flag in parameters)})"
    for unknown in [argument.lstrip("-") for argument in rest if argument.startswith("-")]:
        flag = unknown.partition("=")[0]
        near = difflib.get_close_matches(flag, parameters, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        if takes_overrides and "." in flag and not near:
            hint = f"; write overrides without dashes: {unknown}"
        elif takes_overrides and (keys := within(getattr(fn, "config", HeadTrainConfig), flag)):
            hint = f"; did you mean {'= or '.join(keys)}=?"
        raise ConfigError(f"unknown flag --{flag}{hint} {known}")
    if rest and not takes_overrides:
        raise ConfigError(f"unexpected argument {rest[0]!r} {known}")
    for flag, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and not hasattr(given, flag):
            raise ConfigError(f"give --{flag} VALUE")
    return fn(*rest, **vars(given))


def _spelled(argv: list[str], alone: dict[str, set[type]], parameters: dict) -> list[str]:
    """`--data-format` -> `--data_format`; `--dry` and `--nodry` -> `--dry=true` and `=false`."""
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "-"], strict=False):
        name, equals, value = argument.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w-]*", name):
            name = "--" + name[2:].replace("-", "_")
            switched = "--" + name.removeprefix("--no").lstrip("_")
            if not equals and name in alone:
                flags_only = alone[name] == {bool} and following.lower() not in _BOOLS
                if flags_only or following.startswith("-") or _OVERRIDE.match(following):
                    equals, value = "=", "true"
            elif not equals and switched in alone and name[2:] not in parameters:
                name, equals, value = switched, "=", "false"
        spelled.append(name + equals + value)
    return spelled


def _read(kinds: set[type], text: str) -> Any:
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
    raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
