"""The row-invariant linear in the place of a model's `nn.Linear` layers, for a pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from kernels import cpu_extension
from kernels.dispatch import fast
from kernels.linear import lean, linear, quantize

TYPES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
VECTORS = 64  # numbers that torch's loops over any type take at once, or a multiple
SHARE = 32768  # numbers, at least, of a thread's share
FUNCTIONS = set("silu gelu tanh sigmoid exp erf log softplus mish sin cos".split())
# of torch, but `linear`
PRODUCTS = set(
    "matmul __matmul__ __rmatmul__ mm bmm mv addmm addbmm baddbmm einsum tensordot conv1d grouped_mm "
    "_grouped_mm".split()
)
_failed: dict[Path, str] = {}
_lean: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


class Int8Linear(nn.Module):
    """A linear layer in int8, `kernels.linear.quantize`: [..., K] -> [..., N] of the rows' dtype.
    weight uint8 [N, 68 * groups]. No gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", quantize(layer.weight.detach()))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def to_int8(model: nn.Module) -> None:
    """Every `nn.Linear` of the model in int8, the output layer too; an embedding that is tied to it
    stays as it is."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, Int8Linear(layer))


def linears_of(modules: Iterable[nn.Module]) -> list[nn.Linear | Int8Linear]:
    """Those that can be lent: on a CPU, neither of another kind nor with a forward of their own."""
    return [
        m
        for m in dict.fromkeys(modules)
        if type(m) in (nn.Linear, Int8Linear)
        and "forward" not in vars(m)
        and m.weight.dtype in TYPES
        and m.weight.device.type == "cpu"
    ]


@contextmanager
def lent(linears: list[nn.Linear], forwards: Iterable[Callable]) -> Iterator[None]:
    """Each layer computes with the forward given, hooks and all; afterwards with its own. One that
    is lent already stays so."""
    mine = []
    try:
        for layer, forward in zip(linears, forwards, strict=True):
            if vars(layer).setdefault("forward", forward) is forward:
                mine.append(layer)
        yield
    finally:
        for layer in mine:
            vars(layer).pop("forward", None)


def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def has_products(module: nn.Module) -> bool:
    """Does it hold matrices, and not to look up rows of them?"""
    matrices = any(p.ndim > 1 for p in module.parameters(recurse=False))
    return matrices and not isinstance(module, nn.Embedding)


def has_functions(module: nn.Module) -> bool:
    """Is it an activation, or a rotary embedding?"""
    kind = type(module).__module__
    turns = any(name.endswith("inv_freq") for name in vars(module)["_buffers"])
    return turns or kind in ("torch.nn.modules.activation", "transformers.activations")


def whole_vectors(function: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """An element-wise function of torch, which computes numbers that fill no vector, at the end of
    a thread's share, by other code: here there are none."""
    threads = min(torch.get_num_threads(), -(-x.numel() // SHARE))
    more = -x.numel() % (VECTORS * max(threads, 1))
    flat = F.pad(x.reshape(-1), (0, more))
    return function(flat, *args, **kwargs)[: x.numel()].view(x.shape)


class Exact(TorchFunctionMode):
    """What is lent to eager passes over these modules, where the C++ runs: linear layers, `F.linear`
    in routers, experts and the like (of experts the loop over them, which transformers calls
    eager), and whole vectors of activations and rotary angles. elsewhere: kinds of modules that
    were seen to multiply by other means."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        modules, self.elsewhere = list(modules), set()
        self.linears = linears_of(modules)
        known = {id(m) for m in self.linears}
        self.others = [m for m in modules if id(m) not in known and self._takes(m)]
        self.forwards = [partial(forward, layer) for layer in self.linears]
        self.forwards += [partial(self._run, module) for module in self.others]

    @staticmethod
    def _takes(module: nn.Module) -> bool:
        ours = has_products(module) or has_functions(module)
        usual = all(
            p.is_floating_point() and p.device.type == "cpu" for p in module.parameters(False)
        )
        return ours and usual and "forward" not in vars(module)

    def lent(self):
        if not (self.linears and fast(self.linears[0].weight)):
            return nullcontext()
        # what is exported has one code for any number of tokens, and may not ask for that number
        others = [] if torch.compiler.is_compiling() else self.others
        modules = [*self.linears, *others]
        return lent(modules, self.forwards[: len(modules)])

    def _run(self, module: nn.Module, *args, **kwargs):
        own = type(module).forward
        with self:
            self._module = module
            return getattr(own, "__wrapped__", own)(module, *args, **kwargs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            return linear(*args, **(kwargs or {}))
        if function.__name__ in FUNCTIONS:
            return whole_vectors(function, *args, **(kwargs or {}))
        if function.__name__ in PRODUCTS:
            self.elsewhere.add(type(self._module).__name__)
        return function(*args, **(kwargs or {}))


def load_kernels(folder: Path) -> str | None:
    """The C++ of a CPU, compiled into `folder` where it is not there; the reason where it cannot
    be."""
    if folder not in _failed:
        try:
            return cpu_extension.load(folder)
        except Exception as error:
            _failed[folder] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _failed[folder]


def table(linears: list[nn.Linear]):
    """What `torch.ops.eagle_cpu.lend` takes: the weights, by number. They are the layers' own, but
    for float32 that bf16 holds: a copy of half the bytes, made once."""
    for layer in linears:
        weight = layer.weight.detach()
        found = _lean.get(layer)
        if found is None or not torch.equal(found.to(weight.dtype), weight):
            _lean[layer] = lean(weight)
    biases = [None if m.bias is None else m.bias.detach() for m in linears]
    return torch.classes.eagle_cpu.Linears([_lean[m] for m in linears], biases)
