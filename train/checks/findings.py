"""A finding: what is so, how bad it is, and what to do about it. Knows no checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from configs.errors import ConfigError
from eagle.errors import EagleError

LEVELS = ("ok", "note", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """check: a stable name. remedy: what to do; empty for `ok` alone."""

    level: str
    check: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level
        assert bool(self.remedy) != (self.level == "ok"), self


def ok(check: str, text: str) -> Finding:
    return Finding("ok", check, text)


def note(check: str, text: str, remedy: str) -> Finding:
    return Finding("note", check, text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding("warning", check, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    return Finding("problem", check, text, remedy)


def failed(check: str, error: Exception) -> Finding:
    """An exception as a problem. By the convention of our errors, their remedy follows the last
    semicolon or colon; anything else is what a broken installation or file raises."""
    text = " ".join(str(error).split())
    if not isinstance(error, (EagleError, ConfigError)):
        reason = f"this check broke: {type(error).__name__}: {text[:300]}"
        return problem(check, reason, "repair what it names, or report it with --json")
    for mark in ("; ", ": "):
        what, found, remedy = text.rpartition(mark)
        if found:
            return problem(check, what, remedy)
    return problem(check, text, "see the message")


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `run` finds. A check that breaks is itself a finding: the others still count."""
    found: list[Finding] = []
    try:
        found.extend(run())
    except Exception as error:  # whatever it is, doctor is there to say so
        found.append(failed(check, error))
    return found


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
