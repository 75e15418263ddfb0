"""Compiled passes on a CPU: the target's and the head's forward through AOTInductor, kept on disk.

A pass is exported once, for any number of packed tokens T >= 1: one code, and so the same bits of a
token, for all of them. Attention stays outside, as one opaque operator that looks up the pass that
runs (`current`): so a compiled pass knows nothing of batch sizes, tree shapes, context lengths or
capacities, and none of them recompiles it. Linear layers are opaque operators too, over the
weights that are lent to a pass; embeddings and norms are folded into the package. The plain engine
runs on the same packages.

T packed tokens, H hidden, D draft vocabulary, V vocabulary, F features."""

from __future__ import annotations

import hashlib
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import cpu_extension
from kernels.cpu_extension import cpu_flags, keep

from .attention import TreeContext
from .cache import StaticKVCache
from .draft import HeadDrafter
from .errors import EagleError
from .linears import lent, linears_of, table
from .loading import compiled_folder
from .target import Target

# what is folded into a package lives beside the model's own
LARGEST = 4 * 2**30
CODE = "attention cache compile draft heads/head heads/head_config linears target".split()

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
    and what else decides what it computes. Its linear layers become operators, which find their
    weights when it runs."""

    def __init__(self, run: Callable, parts: list, *facts) -> None:
        super().__init__()
        self.run, self.parts, self.facts = run, torch.nn.ModuleList(parts), facts
        self.linears = linears_of(self.parts.modules())

    def forward(self, *inputs):
        def operator(number, linear):
            return lambda x: torch.ops.eagle.linear(x, number, linear.out_features)

        operators = map(operator, range(len(self.linears)), self.linears)
        with lent(self.linears, operators):
            return self.run(Opaque(), *inputs)

    def constants(self) -> list[tuple[str, torch.Tensor]]:
        """What a package holds: all weights and buffers but those of the linear layers alone."""
        others = [m for m in self.modules() if not any(m is linear for linear in self.linears)]
        kept = {id(p) for m in others for p in (*m.parameters(False), *m.buffers(False))}
        named = (*self.named_parameters(), *self.named_buffers())
        return [(name, weight) for name, weight in named if id(weight) in kept]

    def check(self, exported: torch.export.ExportedProgram) -> None:
        """No weight of a linear layer may be read but by the operator: no key would tell it."""
        held, used = (
            {id(w) for _, w in self.constants()},
            {n.name for n in exported.graph.nodes if n.users},
        )
        named = dict(self.named_parameters(remove_duplicate=False))
        for spec in exported.graph_signature.input_specs:
            if (
                spec.target in named
                and spec.arg.name in used
                and id(named[spec.target]) not in held
            ):
                raise EagleError(f"{spec.target} is read outside of its layer")


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
        return self._read(context, features, tokens, positions, keep)


def load(module: Pass, example: tuple, name: str, seconds: dict[str, float]):
    """The module compiled for any number of tokens, or read from the disk."""
    size = sum(p.numel() * p.element_size() for _, p in module.constants())
    if size > LARGEST:
        said = f"compile='max' copies what is no linear layer, and {size / 2**30:.1f} GiB is"
        raise EagleError(f"{said} too much for that; use compile='off'")
    started = time.perf_counter()
    try:
        cpu_extension.load(compiled_folder())
    except Exception as error:
        raise cannot_compile(error) from error
    folder = compiled_folder() / f"{name}-{key(module, example)}"
    tokens, rows = (torch.export.Dim(name, min=1, max=2**20) for name in ("T", "b"))
    shapes = tuple({1: tokens} if x.ndim > 1 else {0: rows} for x in example)
    # no two inputs may be one tensor: export would take them for one
    compiled = package(module, tuple(x.clone() for x in example), folder / "pass.pt2", [shapes])
    weights = table(module.linears)
    seconds[name] = round(time.perf_counter() - started, 2)

    def run(context, *inputs):
        global current
        with _turn:
            current = context
            torch.ops.eagle_cpu.enter(context.packed())
            torch.ops.eagle_cpu.lend(weights)
            try:
                # packages read memory as it lay when they were made: contiguous
                return compiled(*(x.contiguous() for x in inputs))
            finally:
                torch.ops.eagle_cpu.enter(None)
                torch.ops.eagle_cpu.lend(None)
                current = None

    return run


def package(module, example, path: Path, dynamic):
    def make(scratch: Path) -> Path:
        # any number of tokens, one too: the same code, and so the same bits, for all
        any_size = torch.fx.experimental._config.patch(backed_size_oblivious=True)
        with torch.inference_mode(False), torch.no_grad(), any_size:
            shapes, made = tuple(dynamic), scratch / path.name
            exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            if isinstance(module, Pass):
                module.check(exported)
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


def key(module: Pass, example: tuple) -> str:
    """All that a package depends on: what it holds to the last bit, code, versions, machine,
    threads."""
    import transformers

    shapes = [(x.dtype, x.shape[2:]) for x in example]
    versions = torch.__version__, transformers.__version__
    processor = platform.machine(), torch.backends.cpu.get_cpu_capability(), cpu_flags()
    made_of = module.run.__name__, str(module), module.facts, shapes
    facts = versions, processor, torch.get_num_threads(), made_of
    digest = hashlib.sha256(repr(facts).encode())
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for linear in module.linears:
        digest.update(f"{linear}{linear.weight.dtype}".encode())
    for name, weight in module.constants():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
