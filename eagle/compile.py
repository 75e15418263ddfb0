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
from collections.abc import Callable
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
CODE = "attention cache compile draft heads/head heads/head_config target".split()

_library = torch.library.Library("eagle", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, float scaling, int window, float softcap, "
    "Tensor? sinks) -> Tensor"
)
_library.define("linear(Tensor x, int number, int out_features) -> Tensor")
current: TreeContext | None = None
_turn = threading.Lock()  # one pass at a time is `current`, whatever model it is of


def _attend(q, k, v, layer, scaling, window, softcap, sinks):
    out = current.attend(layer, q, k, v, scaling, window or None, softcap or None, sinks)
    return out.contiguous()  # as `_attend_shape` promises


def _attend_shape(q, k, v, layer, scaling, window, softcap, sinks):
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("eagle::attend", _attend_shape, lib=_library)


def _linear_shape(x, number, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


torch.library.register_fake("eagle::linear", _linear_shape, lib=_library)


class Opaque:
    """Stands for a `TreeContext` while a pass is exported: calls the operator in its place."""

    cache = StaticKVCache(0, 1, 1, 1, 1, torch.float32, "cpu")

    def attend(self, layer, q, k, v, scaling, window=None, softcap=None, sinks=None):
        return torch.ops.eagle.attend(q, k, v, layer, scaling, window or 0, softcap or 0.0, sinks)


class Pass(torch.nn.Module):
    """A pass to be exported: the method `run` of a context and tensors, the modules that it uses,
    and what else decides what it computes."""

    def __init__(self, run: Callable, parts: list, *facts) -> None:
        super().__init__()
        self.run, self.parts, self.facts = run, torch.nn.ModuleList(parts), facts

    def forward(self, *inputs):
        return self.run(Opaque(), *inputs)


def target_pass(target: Target) -> Pass:
    return Pass(target.run, [target.model], target.config.to_json_string(), target.feature_layers)


def head_pass(drafter: HeadDrafter, run: Callable) -> Pass:
    """run: the drafter's `step` or `read`."""
    others = [] if drafter.head.has_output else [drafter.logits]  # the target's
    return Pass(run, [drafter.head, drafter.embed, *others], drafter.head.config)


def compile_target(target: Target, seconds: dict[str, float]):
    """`Target.run` for trees."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    return load(target_pass(target), (ids, ids), "target", seconds)


class CompiledHead:
    """`step` and `read` of a HeadDrafter."""

    def __init__(self, drafter: HeadDrafter, seconds: dict[str, float]) -> None:
        ids, keep = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        config, dtype = drafter.head.config, drafter.head.fc.weight.dtype
        widths = config.hidden_size, config.feature_size
        hidden, features = (torch.zeros(1, 8, width, dtype=dtype) for width in widths)
        self.step = load(head_pass(drafter, drafter.step), (hidden, ids, ids), "head", seconds)
        read = head_pass(drafter, drafter.read)
        self._read = load(read, (features, ids, ids, keep), "ingest", seconds)

    def read(self, context, features, tokens, positions, keep):
        # a package takes two rows at least
        twice = keep if len(keep) > 1 else keep.expand(2)
        out, log_probs = self._read(context, features, tokens, positions, twice)
        return out[:, : len(keep)], log_probs[:, : len(keep)]


def load(module: Pass, example: tuple, name: str, seconds: dict[str, float]):
    """The module compiled for one token and for any number of tokens, or read from the disk."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGEST:
        said = f"compile='max' keeps a second copy of the weights, and {size / 2**30:.1f} GiB is"
        raise EagleError(f"{said} too much for that; use compile='off'")
    started = time.perf_counter()
    try:
        load_extension(compiled_folder(), cpu_flags())
    except Exception as error:
        raise cannot_compile(error) from error
    folder = compiled_folder() / f"{name}-{key(module, example)}"
    tokens, rows = (torch.export.Dim(name, min=2, max=2**20) for name in ("T", "b"))
    shapes = tuple({1: tokens} if x.ndim > 1 else {0: rows} for x in example)
    fixed = tuple(None if x.ndim > 1 else {0: rows} for x in example)
    single = tuple(x[:, :1].clone() if x.ndim > 1 else x.clone() for x in example)
    one = package(module, single, folder / "one.pt2", [fixed])
    # no two inputs may be one tensor: export would take them for one
    many = package(module, tuple(x.clone() for x in example), folder / "many.pt2", [shapes])
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
            shapes, made = tuple(dynamic), scratch / path.name
            exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            options = {"freezing": True, "cpp.enable_concat_linear": True}
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(made), inductor_configs=options
            )
        return made

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


def key(module: Pass, example: tuple) -> str:
    """All that a package depends on: weights to the last bit, code, versions, machine, threads."""
    import transformers

    shapes = [(x.dtype, x.shape[2:]) for x in example]
    versions = torch.__version__, transformers.__version__
    processor = platform.machine(), torch.backends.cpu.get_cpu_capability(), cpu_flags()
    made_of = module.run.__name__, str(module), module.facts, shapes
    facts = versions, processor, torch.get_num_threads(), made_of
    digest = hashlib.sha256(repr(facts).encode())
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("flags")), platform.processor())
