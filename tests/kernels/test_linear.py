"""The C++ linear: a row's bits do not depend on its company, and are the reference's within rounding.

M rows, K inputs, N outputs."""

import shutil

import pytest
import torch

from kernels import cpu_extension
from kernels.linear import Packed, linear, linear_reference

KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 weights": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
SIZES = [(1, 1), (63, 17), (32, 16), (96, 160), (577, 150), (1000, 33)]


@pytest.fixture(scope="module", autouse=True)
def operator(compile_cache):
    if not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    import eagle.compile

    cpu_extension.load(eagle.compile.compiled_folder(), eagle.compile.cpu_flags())


def problem(kind, K, N, M=70, bias=True):
    """Rows [M, K] and weights of these types: (x, weight [N, K], bias [N] or None)."""
    x_type, w_type = KINDS[kind]
    g = torch.Generator().manual_seed(K * N)
    x, weight = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g) / K**0.5
    added = torch.randn(N, generator=g).to(x_type) if bias else None
    return x.to(x_type), weight.to(w_type).to(x_type), added


@pytest.mark.parametrize("K, N", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind, K, N):
    x, weight, bias = problem(kind, K, N)
    packed = Packed(weight, bias)
    alone = torch.cat([linear(row, packed) for row in x.split(1)])
    for M in range(1, 71):
        assert torch.equal(linear(x[:M], packed), alone[:M])
        assert torch.equal(linear(x[70 - M :].view(1, M, K), packed)[0], alone[70 - M :])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], packed), alone[order])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(linear(x, packed), alone)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_are_not_finite_do_not_matter(kind):
    x, weight, bias = problem(kind, 77, 40)
    packed = Packed(weight, bias)
    expected = linear(x, packed)
    for poison in (float("nan"), float("inf")):
        other = x.clone()
        other[1::2] = poison
        got = linear(other, packed)
        assert torch.equal(got[::2], expected[::2]) and not got[1::2].isfinite().any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("K, N", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, K, N, bias):
    """|error| <= (K + 2) u sum |x w|, u = 2^-24, of the sum, and half a unit of the result's type
    (bf16 products of AMX and AVX512-BF16 may flush denormal numbers: their size)."""
    x, weight, added = problem(kind, K, N, bias=bias)
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if added is None else added.abs())
    bound = (K + 2) * 2**-24 * size + exact.abs() * torch.finfo(x.dtype).eps / 2 * 1.01 + 1e-7
    for got in (linear(x, Packed(weight, added)), linear_reference(x, weight, added)):
        assert got.dtype == x.dtype and got.shape == (70, N)
        assert ((got.double() - exact).abs() <= bound).all()


def test_weights_take_half_the_bytes_where_that_is_exact():
    """The same bits as with float32 panels."""
    x, weight, bias = problem("bf16 weights", 65, 33)
    half, full = Packed(weight, bias), Packed(weight, bias)
    assert half.panels.dtype == torch.bfloat16 and torch.equal(half.weight.float(), weight)
    wide = torch.nn.functional.pad(weight, (0, 0, 0, 15)).view(3, 16, 65).transpose(1, 2)
    full.panels = wide.contiguous()
    assert torch.equal(full.weight, weight)
    assert torch.equal(linear(x, half), linear(x, full))
    assert Packed(problem("fp32", 65, 33)[1]).panels.dtype == torch.float32


def test_the_reference_runs_where_the_extension_is_not(monkeypatch):
    x, weight, bias = problem("bf16", 40, 20)
    monkeypatch.setattr(cpu_extension, "loaded", False)
    assert torch.equal(linear(x, Packed(weight, bias)), linear_reference(x, weight, bias))


def test_other_shapes():
    x, weight, _ = problem("fp32", 24, 40)
    packed = Packed(weight)
    assert linear(x[:0], packed).shape == (0, 40)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert torch.equal(linear(strided, packed), linear(x, packed))
    assert torch.equal(linear(x[0], packed), linear(x, packed)[0])
    with pytest.raises(RuntimeError, match="not of 23 inputs and 40 outputs"):
        linear(x[:, :23], packed)
