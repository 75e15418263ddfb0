"""The doctor's findings about the installation and the devices."""

from __future__ import annotations

import importlib.util
import os
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
PACKAGES = ("configs", "eagle", "records", "train", "inference")  # our top-level ones


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

    @classmethod
    def of(cls, good: bool, check: str, text: str, remedy: str, level: str = "problem") -> Finding:
        """`ok` if it is good, else `level` with the remedy."""
        return cls("ok", check, text) if good else cls(level, check, text, remedy)


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `run` finds. A check that breaks is itself a finding: the others still count. The remedy
    of our own errors follows their last semicolon or colon."""
    found: list[Finding] = []
    try:
        found += run()
    except (EagleError, ConfigError) as error:
        text = one_line(error)
        what, _, remedy = text.rpartition("; " if "; " in text else ": ")
        found.append(Finding("problem", check, what or text, remedy or "see the message"))
    except Exception as error:  # what a broken installation or file raises
        reason = f"this check broke: {type(error).__name__}: {one_line(error)}"
        remedy = "repair what it names, or report it with --json"
        found.append(Finding("problem", check, reason, remedy))
    return found


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (EagleError, ConfigError)) else text[:200]


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.3g} GiB"


# the installation


def versions() -> Iterator[Finding]:
    """Below the range that the package declares is a problem, above it untested."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    try:
        declared = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        remedy = "run make install, or pip install -e ."
        yield Finding("warning", "versions", "this checkout is not installed", remedy)
        return
    good = []
    for need in map(Requirement, declared):
        found = version(need.name)
        wanted = need.marker is None or need.marker.evaluate({"extra": ""})
        command = f"pip install '{need.name}{need.specifier}'"
        if found is None and wanted:
            yield Finding("problem", "versions", f"{need.name} is not installed", command)
        elif found and need.specifier.contains(found, prereleases=True):
            good.append(f"{need.name} {found}")
        elif found:
            newer = Version(found) >= max(Version(bound.version) for bound in need.specifier)
            text = f"{need.name} {found} is {'newer' if newer else 'older'} than supported"
            yield Finding("warning" if newer else "problem", "versions", text, command)
    yield Finding("ok", "versions", ", ".join(dict.fromkeys(good)))


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def clashes() -> Iterator[Finding]:
    """Other distributions that install a top-level package of ours."""
    import eagle  # noqa: F401  (appends our folder to kernels.__path__)

    owners = metadata.packages_distributions()
    for name in PACKAGES:
        others = sorted(set(owners.get(name, ())) - {OURS})
        if others:
            text = f"{', '.join(others)} also installs a package called {name!r}"
            remedy = f"pip uninstall {' '.join(others)}, or use an environment of its own"
            yield Finding("problem", "names", text, remedy)
    found = importlib.util.find_spec("kernels.tree_attention") is not None
    text = "our kernels are found" if found else "another package 'kernels' hides ours"
    yield Finding.of(found, "names", text, "import eagle before kernels, or pip uninstall kernels")


def deepspeed(zero: int = 0, seconds: float = 90) -> Iterator[Finding]:
    """Trains a step in a process of its own: DeepSpeed can be initialised once in each."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in ranks}
    code = f"from train.doctor_machine import deepspeed_step; deepspeed_step({zero})"
    good, lines = said_by([sys.executable, "-c", code], seconds, env=environment, cwd=ROOT)
    text = lines[-1] if good else f"it cannot train one step: {lines[-1][:300]}"
    remedy = f"see all of it: python -c '{code}'; stale locks are in ~/.cache/torch_extensions"
    yield Finding.of(good, "deepspeed", text, remedy)


def said_by(command: list[str], seconds: float = 60, **options) -> tuple[bool, list[str]]:
    """Has it ended well? And the lines that it wrote, to stderr where it has not."""
    given = {"capture_output": True, "text": True, "timeout": seconds, **options}
    try:
        done = subprocess.run(command, **given)
    except subprocess.TimeoutExpired:
        return False, [f"it took more than {seconds:g} s"]
    said = done.stderr if done.returncode else done.stdout
    return not done.returncode, said.strip().splitlines() or ["no output"]


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
            text = f"no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
            remedy = "use a GPU for targets above a billion parameters"
            yield Finding("note", "device", text, remedy)
        fast = fast_bf16(torch.device("cpu"))
        text = f"this CPU {'multiplies bf16 natively' if fast else 'emulates bf16, slowly'}"
        remedy = "leave dtypes as they are, or set train.dtype=fp32, model.compute=fp32 (finetune)"
        yield Finding.of(fast, "bf16", text, remedy, "note")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} {facts.name}, sm_{facts.major}{facts.minor}, "
        yield Finding("ok", "device", f"{text}{size(free)} of {size(total)} free")
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
        commit_kv_reference(expected, lengths, path, counts)
        said = "" if torch.equal(buffer, expected) else "a result differs from its reference"
    except Exception as error:  # a compiler's, a driver's or a linker's
        said = one_line(error)
    text = f"our kernels do not work: {said}" if said else "our kernels equal their references"
    remedy = "install gcc and the Python headers, or set EAGLE_TRITON=0 for the references"
    yield Finding.of(not said, "triton", text, remedy)


def compiler() -> Iterator[Finding]:
    """What compile="max" and train.compile need on a CPU."""
    from torch.utils.cpp_extension import is_ninja_available

    from kernels.cpu_extension import FLAGS

    name = os.environ.get("CXX", "g++")
    source = "#include <vector>\n#include <bit>\nint main() {}\n"
    command = [name, *FLAGS, "-x", "c++", "-fsyntax-only", "-"]
    try:
        good, lines = said_by(command, input=source)
        text = f"{name} compiles C++20" if good else f"{name} cannot compile C++20: {lines[0]}"
    except OSError:
        good, text = False, f"no C++ compiler ({name})"
    remedy = "install g++ 11 or newer (Debian: apt-get install g++); compile='max' needs it"
    yield Finding.of(good, "c++", text, remedy, "warning")
    if not is_ninja_available():
        yield Finding("warning", "c++", "ninja does not run", "pip install ninja")
