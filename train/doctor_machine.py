"""The doctor's findings about the installation, the devices and the disk."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import HeadTrainConfig
from eagle.errors import EagleError

COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
OURS = "eagle-heads"
ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "eagle", "records", "train", "inference")
LITTLE, NOTHING = 5 * 2**30, 2**30  # bytes of free disk


@dataclass(frozen=True)
class Finding:
    """What is so, how bad it is (ok, note, warning, problem), and what to do about it.

    check: a stable name. remedy: empty for `ok` alone.
    """

    level: str
    check: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level in COLOURS and bool(self.remedy) != (self.level == "ok"), self


def failed(check: str, error: Exception) -> Finding:
    """An exception as a problem. The remedy of our own errors follows their last semicolon or
    colon; anything else is what a broken installation or file raises."""
    text = " ".join(str(error).split())
    if not isinstance(error, (EagleError, ConfigError)):
        reason = f"this check broke: {type(error).__name__}: {text[:300]}"
        return Finding("problem", check, reason, "repair what it names, or report it with --json")
    for mark in ("; ", ": "):
        what, found, remedy = text.rpartition(mark)
        if found:
            return Finding("problem", check, what, remedy)
    return Finding("problem", check, text, "see the message")


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `run` finds. A check that breaks is itself a finding: the others still count."""
    found: list[Finding] = []
    try:
        found.extend(run())
    except Exception as error:  # whatever it is, the doctor is there to say so
        found.append(failed(check, error))
    return found


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# the installation


def versions() -> Iterator[Finding]:
    """Below the range that the package declares is a problem, above it untested."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    low, high = (3, 10), (3, 13)
    text = f"Python {platform.python_version()}"
    if low <= sys.version_info[:2] <= high:
        yield Finding("ok", "python", text)
    else:
        yield Finding("warning", "python", f"{text} is untested", "use Python 3.10 to 3.13")
    try:
        declared = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        remedy = "run make install, or pip install -e ."
        yield Finding("warning", "versions", "this checkout is not installed", remedy)
        return
    good = []
    for need in map(Requirement, declared):
        optional = "extra" in str(need.marker or "")
        found = _version(need.name)
        if (need.marker and not optional and not need.marker.evaluate()) or (
            optional and found is None
        ):
            continue
        command = f"pip install '{need.name}{need.specifier}'"
        if found is None:
            yield Finding("problem", "versions", f"{need.name} is not installed", command)
        elif need.specifier.contains(found, prereleases=True):
            good.append(f"{need.name} {found}")
        else:
            bounds = [s for s in need.specifier if s.operator in ("<", "<=")]
            above = any(Version(found) >= Version(s.version) for s in bounds)
            text = f"{need.name} {found} is {'newer' if above else 'older'} than supported"
            yield Finding("warning" if above else "problem", "versions", text, command)
    yield Finding("ok", "versions", ", ".join(dict.fromkeys(good)))


def clashes() -> Iterator[Finding]:
    """Distributions that install a top-level package of ours, and imports that end elsewhere."""
    import eagle  # noqa: F401  (appends our folder to kernels.__path__)

    owners = metadata.packages_distributions()
    for name in PACKAGES:
        others = sorted(set(owners.get(name, ())) - {OURS})
        if others:
            text = f"{', '.join(others)} also installs a package called {name!r}"
            remedy = f"pip uninstall {' '.join(others)}, or use an environment of its own"
            yield Finding("problem", "names", text, remedy)
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if places and Path(places[0]).resolve() != ROOT / name:
            text = f"'import {name}' finds {places[0]}, not ours"
            remedy = "remove that folder from sys.path (PYTHONPATH, the current folder)"
            yield Finding("problem", "names", text, remedy)
    if importlib.util.find_spec("kernels.tree_attention") is None:
        text = "another package 'kernels' hides ours"
        remedy = "import eagle before kernels, or pip uninstall kernels"
        yield Finding("problem", "names", text, remedy)
    else:
        beside = sorted(set(owners.get("kernels", ())) - {OURS})
        text = f"beside Hugging Face's ({', '.join(beside)})" if beside else "alone of that name"
        yield Finding("ok", "names", f"our kernels are found, {text}")


def deepspeed(zero: int = 0, seconds: float = 90) -> Iterator[Finding]:
    """Trains a step in a process of its own: DeepSpeed can be initialised once in each."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in ranks}
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    code = f"from train.doctor_machine import deepspeed_step; deepspeed_step({zero})"
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        text = f"one training step took more than {seconds:g} s"
        remedy = "delete a stale lock in ~/.cache/torch_extensions"
        yield Finding("problem", "deepspeed", text, remedy)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        remedy = f"repair it; to see all of it: python -c '{code}'"
        yield Finding("problem", "deepspeed", f"it cannot train one step: {reason}", remedy)
        return
    yield Finding("ok", "deepspeed", done.stdout.strip().splitlines()[-1])


def deepspeed_step(zero: int) -> None:
    """One step of a tiny layer with the ZeRO preset, in this process alone."""
    import torch

    from configs.deepspeed_presets import deepspeed_config
    from train.head.distributed import import_deepspeed, join_world

    world = join_world()
    cfg = HeadTrainConfig.model_validate({"train": {"zero": zero, "batch_size": 1}})
    layer = torch.nn.Linear(8, 8)
    engine, *_ = import_deepspeed().initialize(
        model=layer, model_parameters=list(layer.parameters()), config=deepspeed_config(cfg)
    )
    engine.backward(engine(torch.ones(1, 8, device=world.device)).square().sum())
    engine.step()
    print(f"trains a step alone with ZeRO {zero} on {world.device}")


def devices() -> Iterator[Finding]:
    import torch

    from eagle.loading import fast_bf16

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
        if driver and torch.version.cuda is None and torch.version.hip is None:
            text = "this machine has an NVIDIA driver, and PyTorch is a CPU build"
            remedy = "install a CUDA build of torch (see pytorch.org)"
            yield Finding("warning", "device", text, remedy)
        else:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
            text = "CUDA_VISIBLE_DEVICES is empty: GPUs are hidden" if hidden else "no GPU"
            remedy = "use a GPU for targets above a billion parameters"
            yield Finding("note", "device", text, "unset it" if hidden else remedy)
        if fast_bf16(torch.device("cpu")):
            yield Finding("ok", "bf16", "this CPU multiplies bf16 natively")
        else:
            remedy = (
                "leave dtypes at their defaults, or set train.dtype=fp32, in fine-tuning "
                "model.compute=fp32, in generation --dtype float32"
            )
            yield Finding("note", "bf16", "this CPU emulates bf16, slowly", remedy)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} {facts.name}, sm_{facts.major}{facts.minor}, "
        text += f"{size(free)} of {size(total)} free"
        if free < 0.5 * total:
            remedy = "see nvidia-smi, or choose another GPU with CUDA_VISIBLE_DEVICES"
            yield Finding("warning", "device", f"{text}: others hold the rest", remedy)
        else:
            yield Finding("ok", "device", text)
        if facts.major < 8 and torch.version.hip is None:
            remedy = "set model.dtype=float16 train.dtype=fp32"
            yield Finding("note", "bf16", f"cuda:{index} has no bf16 tensor cores", remedy)
    yield from triton()


def triton() -> Iterator[Finding]:
    """Compile and run the smallest of our kernels, against its reference."""
    import torch

    from kernels.commit_kv import commit_kv, commit_kv_reference

    buffer = torch.randn(1, 2, 1, 1, 8, 16, device="cuda")
    expected = buffer.clone()
    lengths, counts = torch.tensor([2], device="cuda"), torch.tensor([2], device="cuda")
    path = torch.tensor([[1, 3]], device="cuda")
    try:
        commit_kv(buffer, lengths, path, counts)
    except Exception as error:  # a compiler's, a driver's or a linker's
        text = f"our kernels do not compile: {' '.join(str(error).split())[:200]}"
        remedy = "install gcc and the Python headers, or set EAGLE_TRITON=0 for the references"
        yield Finding("problem", "triton", text, remedy)
        return
    commit_kv_reference(expected, lengths, path, counts)
    if torch.equal(buffer, expected):
        yield Finding("ok", "triton", "our kernels compile and agree with their references")
    else:
        remedy = "set EAGLE_TRITON=0, and report this GPU and version"
        yield Finding("problem", "triton", "a compiled kernel is wrong", remedy)


def compiler() -> Iterator[Finding]:
    """What compile="max" and train.compile need on a CPU."""
    from torch.utils.cpp_extension import is_ninja_available

    from kernels.cpu_extension import FLAGS

    name = os.environ.get("CXX", "g++")
    text = "#include <vector>\n#include <bit>\nint main() {}\n"
    command = [name, *FLAGS, "-x", "c++", "-fsyntax-only", "-"]
    remedy = "install g++ 11 or newer (Debian: apt-get install g++); compile='max' needs it"
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except OSError:
        yield Finding("warning", "c++", f"no C++ compiler ({name})", remedy)
    else:
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0][:200]
            yield Finding("warning", "c++", f"{name} cannot compile C++20: {reason}", remedy)
        else:
            yield Finding("ok", "c++", f"{name} compiles C++20 with {' '.join(FLAGS)}")
    if not is_ninja_available():
        yield Finding("warning", "c++", "ninja does not run", "pip install ninja")


def folders(cfg: HeadTrainConfig) -> dict[str, Path]:
    """Where a run writes, by the setting that says so."""
    from eagle.loading import cache_folder

    return {
        "data.cache_dir or $EAGLE_CACHE": Path(cfg.data.cache_dir or cache_folder()),
        "train.output": Path(cfg.train.output or "runs"),
    }


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def disk(cfg: HeadTrainConfig) -> Iterator[Finding]:
    for name, folder in folders(cfg).items():
        parent, left = existing(folder), free_bytes(folder)
        text, remedy = f"{folder}: {size(left)} free", f"free some space, or change {name}"
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            yield Finding("problem", "disk", f"{folder} cannot be written", f"change {name}")
        elif left < LITTLE:
            yield Finding("problem" if left < NOTHING else "warning", "disk", text, remedy)
        else:
            yield Finding("ok", "disk", text)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
