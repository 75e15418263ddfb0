"""Versions against what we support, name clashes, and whether DeepSpeed works.

Knows no models or data.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from train.checks.findings import Finding, note, ok, problem, warning

OURS = "eagle-heads"
PACKAGES = ("configs", "eagle", "inference", "kernels", "train")
ROOT = Path(__file__).parents[2]
PYTHON = ((3, 10), (3, 13))
# why one would want the packages of an extra
EXTRAS = {
    "finetune": "QLoRA and 4-bit targets",
    "plots": "plots of benchmarks",
    "eval": "text metrics of inference.evaluate",
    "wandb": "train.report_to=wandb",
    "trackio": "train.report_to=trackio",
}
DEEPSPEED_SECONDS = 90


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What we need, and by extra; from setup.py of a checkout, else from the installed metadata."""
    setup = ROOT / "setup.py"
    text = setup.read_text(encoding="utf-8") if setup.is_file() else ""
    if f'name="{OURS}"' in text:
        given: dict[str, list[str]] = {"": []}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "install_requires":
                given[""] = ast.literal_eval(node.value)
            elif isinstance(node, ast.keyword) and node.arg == "extras_require":
                given |= ast.literal_eval(node.value)
        parsed = {name: [Requirement(text) for text in texts] for name, texts in given.items()}
        return parsed.pop(""), parsed
    base, extras = [], {}
    for text in metadata.requires(OURS) or []:
        requirement = Requirement(text)
        named = [
            n
            for n in metadata.metadata(OURS).get_all("Provides-Extra") or []
            if requirement.marker and f'extra == "{n}"' in str(requirement.marker)
        ]
        for extra in named:
            extras.setdefault(extra, []).append(requirement)
        if not named:
            base.append(requirement)
    return base, extras


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def versions() -> Iterator[Finding]:
    found = sys.version_info[:2]
    if PYTHON[0] <= found <= PYTHON[1]:
        yield ok("python", f"Python {platform.python_version()}")
    else:
        low, high = (".".join(map(str, v)) for v in PYTHON)
        yield warning(
            "python",
            f"Python {platform.python_version()} is untested",
            f"use Python {low} to {high}",
        )
    base, extras = requirements()
    good = []
    for requirement in filter(applies, base):
        finding = judge(requirement)
        if finding.level == "ok":
            good.append(finding.text)
        else:
            yield finding
    yield ok("versions", ", ".join(good))
    for extra, purpose in EXTRAS.items():
        wanted = [r for r in extras.get(extra, ()) if r.marker is None or applies_extra(r, extra)]
        if not wanted:
            continue
        judged = [judge(r) for r in wanted]
        missing = [r.name for r in wanted if installed(r.name) is None]
        if missing:
            yield note(
                "extras",
                f"{', '.join(missing)}: not installed; for {purpose}",
                f"if you want that, pip install '{OURS}[{extra}]'",
            )
        yield from (
            f
            for r, f in zip(wanted, judged, strict=True)
            if f.level != "ok" and r.name not in missing
        )
        if all(f.level == "ok" for f in judged):
            yield ok("extras", ", ".join(f.text for f in judged))


def applies_extra(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def judge(requirement: Requirement) -> Finding:
    """Below the supported range is a problem, above it untested."""
    name, found = requirement.name, installed(requirement.name)
    command = f"pip install '{name}{requirement.specifier}'"
    check = f"version of {name}"
    if found is None:
        return problem(check, f"{name} is not installed (needed: {requirement.specifier})", command)
    if requirement.specifier.contains(found, prereleases=True):
        return ok(check, f"{name} {found}")
    above = any(
        s.operator in ("<", "<=") and Version(found) >= Version(s.version)
        for s in requirement.specifier
    )
    text = f"{name} {found} is {'newer' if above else 'older'} than supported ({requirement.specifier})"
    return (warning if above else problem)(check, text, command)


def clashes() -> Iterator[Finding]:
    """Others' distributions that install a top-level package of ours, and imports that end
    elsewhere.
    """
    owners = metadata.packages_distributions()
    foreign = {name: sorted({d for d in owners.get(name, ()) if d != OURS}) for name in PACKAGES}
    for name, distributions in foreign.items():
        if name != "kernels" and distributions:
            yield problem(
                "name clash",
                f"{', '.join(distributions)} also installs a package called {name!r}: one overwrites "
                "the other",
                f"pip uninstall {' '.join(distributions)}, or use an environment of its own",
            )
    for name in PACKAGES:
        if name == "kernels":
            continue
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if places and Path(places[0]).resolve() != ROOT / name:
            yield problem(
                "name clash",
                f"'import {name}' finds {places[0]}, not ours",
                "remove that folder from sys.path (PYTHONPATH, the current folder)",
            )
    yield from _kernels(foreign["kernels"])


def _kernels(distributions: list[str]) -> Iterator[Finding]:
    """Hugging Face's `kernels` may stand beside ours; transformers probes for it."""
    import eagle  # noqa: F401  (appends our folder to kernels.__path__)

    spec = importlib.util.find_spec("kernels.tree_attention")
    if spec is None:
        yield problem(
            "kernels",
            "our kernels cannot be imported: another package 'kernels' hides them",
            "import eagle before kernels, or pip uninstall kernels",
        )
    elif distributions:
        versions = ", ".join(f"{name} {installed(name)}" for name in distributions)
        yield ok("kernels", f"ours are found beside Hugging Face's ({versions})")
    else:
        yield ok("kernels", "ours are found; no other package uses our names")


def deepspeed(zero: int = 0) -> Iterator[Finding]:
    """In a process of its own: it can be initialised once in each."""
    if importlib.util.find_spec("deepspeed") is None:
        yield problem("deepspeed", "deepspeed cannot be imported", "pip install deepspeed")
        return
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "train.checks.deepspeed_probe", str(zero)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEEPSPEED_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield problem(
            "deepspeed",
            f"one training step took more than {DEEPSPEED_SECONDS} s",
            "look for a stale lock in ~/.cache/torch_extensions and delete it",
        )
        return
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        yield problem(
            "deepspeed",
            f"it cannot train one step: {reason}",
            "python -m train.checks.deepspeed_probe shows all of it",
        )
        return
    result = json.loads(last[0])
    ready = [name for name, fits in result["ops"].items() if fits]
    yield ok(
        "deepspeed",
        f"trains a step alone with ZeRO {zero} on {result['device']} ({result['seconds']:.1f} s)",
    )
    yield ok(
        "deepspeed",
        f"{len(ready)} of {len(result['ops'])} ops can be built here; none is needed"
        + (f": {', '.join(ready)}" if ready else ""),
    )
