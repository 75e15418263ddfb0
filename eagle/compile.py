"""Compiled passes on a CPU: the target's and the head's forward through AOTInductor, kept on disk.

A pass is exported once for any number of packed tokens T >= 2 and once for one token. Attention
stays outside, as one opaque operator that looks up the pass that runs (`current`): so a compiled
pass knows nothing of batch sizes, tree shapes, context lengths or capacities, and none of them
recompiles it. Weights are folded into the package in the layout that oneDNN prefers; the plain
engine runs on the same packages.

T packed tokens, H hidden, D draft vocabulary, V vocabulary, F features."""

from __future__ import annotations

import hashlib
import platform
import threading
import time
from pathlib import Path

import torch

from kernels.cpu_extension import keep
from kernels.cpu_extension import load as load_extension

from .attention import TreeContext
from .cache import StaticKVCache
from .draft import HeadDrafter
from .errors import EagleError
from .loading import cache_folder
from .target import Target

# weights are folded into the package and live beside the model's own
LARGEST = 4 * 2**30

_library = torch.library.Library("eagle", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, float scaling, int window, float softcap, "
    "Tensor? sinks) -> Tensor"
)
current: TreeContext | None = None
_turn = threading.Lock()  # one pass at a time is `current`, whatever model it is of


def _attend(q, k, v, layer, scaling, window, softcap, sinks):
    out = current.attend(layer, q, k, v, scaling, window or None, softcap or None, sinks)
    return out.contiguous()  # as `_attend_shape` promises


def _attend_shape(q, k, v, layer, scaling, window, softcap, sinks):
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("eagle::attend", _attend_shape, lib=_library)


class Opaque:
    """Stands for a `TreeContext` while a pass is exported: calls the operator in its place."""

    def __init__(self, cache: StaticKVCache) -> None:
        self.cache = cache

    def attend(self, layer, q, k, v, scaling, window=None, softcap=None, sinks=None):
        return torch.ops.eagle.attend(q, k, v, layer, scaling, window or 0, softcap or 0.0, sinks)


class TargetPass(torch.nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        self.model, self.target = target.model, [target]  # in a list: not a submodule

    def forward(self, ids, positions):
        target = self.target[0]
        cache = StaticKVCache(0, 1, 1, 1, 1, target.dtype, target.device)
        return target.run(ids, positions, Opaque(cache))


class HeadPass(torch.nn.Module):
    """A draft pass: every token's continuation is asked for."""

    def __init__(self, drafter: HeadDrafter) -> None:
        super().__init__()
        self.head, self.embed, self.drafter = drafter.head, drafter.embed, [drafter]
        if not drafter.head.has_output:
            self.head_logits = drafter.logits  # the target's: a part of the package

    def forward(self, hidden, tokens, positions):
        drafter = self.drafter[0]
        out = drafter.run(hidden, tokens, positions, Opaque(None))
        return out, drafter.log_probs(out)


class IngestPass(HeadPass):
    """Takes the target's features, and asks for the continuation of the tokens `keep` only."""

    def forward(self, features, tokens, positions, keep):
        drafter = self.drafter[0]
        out = drafter.run(self.head.fuse(features), tokens, positions, Opaque(None))
        last = out[:, keep]
        return last, drafter.log_probs(last)


class CompiledTarget:
    """`Target.run` for trees: ids, positions [1, T] -> logits [1, T, V], features [1, T, F]."""

    def __init__(self, target: Target, seconds: dict[str, float]) -> None:
        ids = torch.zeros(1, 8, dtype=torch.int64)
        self.run = load(TargetPass(target), (ids, ids), "target", seconds)

    def __call__(self, ids, positions, context, features):
        logits, found = self.run(context, ids, positions)
        return logits, found if features else None


class CompiledHead:
    """Passes of the head over packed tokens [1, T], returning hidden [1, ., H] and
    log-probabilities [1, ., D]."""

    def __init__(self, drafter: HeadDrafter, seconds: dict[str, float]) -> None:
        ids, keep = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        config, dtype = drafter.head.config, drafter.head.fc.weight.dtype
        widths = config.hidden_size, config.feature_size
        hidden, features = (torch.zeros(1, 8, width, dtype=dtype) for width in widths)
        self.run = load(HeadPass(drafter), (hidden, ids, ids), "head", seconds)
        self.run_ingest = load(IngestPass(drafter), (features, ids, ids, keep), "ingest", seconds)

    def __call__(self, hidden, tokens, positions, context):
        return self.run(context, hidden, tokens, positions)

    def ingest(self, features, tokens, positions, context, keep):
        # a package takes two rows at least
        twice = keep if len(keep) > 1 else keep.expand(2)
        out, log_probs = self.run_ingest(context, features, tokens, positions, twice)
        return out[:, : len(keep)], log_probs[:, : len(keep)]


def load(module: torch.nn.Module, example: tuple, name: str, seconds: dict[str, float]):
    """The module compiled for one token and for any number of tokens; from the disk where it is
    there."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGEST:
        raise EagleError(
            f"compile='max' keeps a second copy of the weights, and {size / 2**30:.1f} GiB is too "
            "much for that; use compile='off'"
        )
    started = time.perf_counter()
    try:
        load_extension(compiled_folder(), cpu_flags())
    except Exception as error:
        raise cannot_compile(error) from error
    folder = compiled_folder() / f"{name}-{key(module, example)}"
    tokens, rows = (torch.export.Dim(name, min=2, max=2**20) for name in ("T", "b"))
    shapes = [{1: tokens} if x.ndim > 1 else {0: rows} for x in example]
    fixed = [None if x.ndim > 1 else {0: rows} for x in example]
    single = tuple(x[:, :1].clone() if x.ndim > 1 else x.clone() for x in example)
    one = package(module, single, folder / "one.pt2", fixed)
    # no two inputs may be one tensor: export would take them for one
    many = package(module, tuple(x.clone() for x in example), folder / "many.pt2", shapes)
    seconds[name] = round(time.perf_counter() - started, 2)

    def run(context, *inputs):
        global current
        with _turn:
            current = context
            torch.ops.eagle_cpu.enter(*context.packed())
            try:
                # packages read memory as it lay when they were made: contiguous
                return (one if inputs[0].shape[1] == 1 else many)(*(x.contiguous() for x in inputs))
            finally:
                torch.ops.eagle_cpu.leave()
                current = None

    return run


def package(module, example, path: Path, dynamic):
    def make(scratch: Path) -> Path:
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(
                module, example, dynamic_shapes=tuple(dynamic), strict=False
            )
            torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(scratch / path.name),
                inductor_configs={"freezing": True, "cpp.enable_concat_linear": True},
            )
        return scratch / path.name

    try:
        return torch._inductor.aoti_load_package(str(keep(path, make)))
    except Exception as error:
        raise cannot_compile(error) from error


def cannot_compile(error: Exception) -> EagleError:
    reason = next(iter(str(error).strip().splitlines()), "")
    return EagleError(
        f"cannot compile this model ({type(error).__name__}: {reason}); use compile='off'. "
        "Compiling on a CPU needs a C++ compiler (g++) and ninja"
    )


def compiled_folder() -> Path:
    return cache_folder() / "compiled"


def key(module: torch.nn.Module, example: tuple) -> str:
    """All that a package depends on: weights to the last bit, code, versions, processor,
    threads."""
    import transformers

    digest = hashlib.sha256()
    facts = (
        torch.__version__,
        transformers.__version__,
        platform.machine(),
        torch.get_num_threads(),
        type(module).__name__,
        torch.backends.cpu.get_cpu_capability(),
        cpu_flags(),
        str(module),
        [(x.dtype, x.shape[2:]) for x in example],
    )
    digest.update(repr(facts).encode())
    if isinstance(module, TargetPass):
        target = module.target[0]
        digest.update(repr((target.config.to_json_string(), target.feature_layers)).encode())
    if isinstance(module, HeadPass):
        digest.update(repr(module.drafter[0].head.config).encode())
    for name in (
        "attention",
        "cache",
        "compile",
        "draft",
        "heads/head",
        "heads/head_config",
        "target",
    ):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def cpu_flags() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line
    except OSError:
        pass
    return platform.processor()
