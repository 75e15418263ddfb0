"""The C++ linear: a row's bits do not depend on its company, and are the reference's within rounding.

M rows, K inputs, N outputs."""

import shutil

import pytest
import torch

from kernels import cpu_extension
from kernels.linear import dequantize, lean, linear, linear_reference, quantize

KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 weights": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "int8": (torch.float32, torch.uint8),
    "int8 and bf16": (torch.bfloat16, torch.uint8),
}
SIZES = [(1, 1), (63, 17), (32, 16), (96, 160), (577, 150), (1000, 33)]


@pytest.fixture(scope="module", autouse=True)
def operator(compile_cache):
    if not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    from eagle.loading import compiled_folder

    cpu_extension.load(compiled_folder())


def problem(kind, K, N, M=70, bias=True):
    """Rows [M, K] and weights of these types: (x, weight [N, K], bias [N] or None)."""
    x_type, w_type = KINDS[kind]
    g = torch.Generator().manual_seed(K * N)
    x, weight = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g) / K**0.5
    added = torch.randn(N, generator=g).to(x_type) if bias else None
    if w_type == torch.uint8:
        return x.to(x_type), quantize(weight), added
    return x.to(x_type), weight.to(w_type).to(x_type), added


@pytest.mark.parametrize("K, N", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind, K, N):
    x, weight, bias = problem(kind, K, N)
    layer = (lean(weight) if kind == "bf16 weights" else weight), bias
    alone = torch.cat([linear(row, *layer) for row in x.split(1)])
    for M in range(1, 71):
        assert torch.equal(linear(x[:M], *layer), alone[:M])
        assert torch.equal(linear(x[70 - M :].view(1, M, K), *layer)[0], alone[70 - M :])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], *layer), alone[order])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(linear(x, *layer), alone)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_are_not_finite_do_not_matter(kind):
    x, weight, bias = problem(kind, 77, 40)
    expected = linear(x, weight, bias)
    for poison in (float("nan"), float("inf")):
        other = x.clone()
        other[1::2] = poison
        got = linear(other, weight, bias)
        assert torch.equal(got[::2], expected[::2]) and not got[1::2].isfinite().any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("K, N", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, K, N, bias):
    """|error| <= (K + 2) u sum |x w|, u = 2^-24, of the sum, and half a unit of the result's type
    (bf16 products of AMX and AVX512-BF16 may flush denormal numbers: their size)."""
    x, weight, added = problem(kind, K, N, bias=bias)
    rows, weights = x, weight
    if weight.dtype == torch.uint8:
        rows, weights = dequantize(quantize(x), K), dequantize(weight, K)
    exact = rows.double() @ weights.double().T + (0 if added is None else added.double())
    size = rows.double().abs() @ weights.double().abs().T + (0 if added is None else added.abs())
    bound = (K + 2) * 2**-24 * size + exact.abs() * torch.finfo(x.dtype).eps / 2 * 1.01 + 1e-7
    for got in (linear(x, lean(weight), added), linear_reference(x, weight, added)):
        assert got.dtype == x.dtype and got.shape == (70, N)
        assert ((got.double() - exact).abs() <= bound).all()


def test_weights_take_half_the_bytes_where_that_is_exact():
    weight = problem("bf16 weights", 65, 33)[1]
    assert lean(weight).dtype == torch.bfloat16 and torch.equal(lean(weight).float(), weight)
    for kind in ("bf16", "fp32", "fp16"):
        weight = problem(kind, 65, 33)[1]
        assert lean(weight) is weight


def test_int8_is_within_half_a_step_of_what_it_was():
    x = torch.randn(9, 130, generator=torch.Generator().manual_seed(3))
    x[2], x[3] = 0, x[3] * 1e-30
    steps = torch.nn.functional.pad(x, (0, 62)).unflatten(-1, (3, 64)).abs().amax(-1) / 127
    error = (dequantize(quantize(x), 130) - x).abs()
    assert (error <= steps.repeat_interleave(64, -1)[:, :130] * 0.5001).all()
    assert quantize(x).shape == (9, 3 * 68) and not error[2].any()


def test_the_reference_runs_where_the_extension_is_not(monkeypatch):
    x, weight, bias = problem("bf16", 40, 20)
    monkeypatch.setattr(cpu_extension, "loaded", False)
    assert torch.equal(linear(x, weight, bias), linear_reference(x, weight, bias))


def test_other_shapes():
    x, weight, _ = problem("fp32", 24, 40)
    assert linear(x[:0], weight).shape == (0, 40)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert torch.equal(linear(strided, weight), linear(x, weight))
    assert torch.equal(linear(x, weight.T.contiguous().T), linear(x, weight))
    assert torch.equal(linear(x[0], weight), linear(x, weight)[0])
    with pytest.raises(RuntimeError, match="as wide as the rows, 23"):
        linear(x[:, :23], weight)
