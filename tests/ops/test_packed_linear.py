"""Products with packed weights: every format, on every instruction set that this machine has."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import (
    explain,
    native,
    pack_weights,
    packed_linear,
    packed_linear_cpu,
    widened,
)
from intarsia.ops.packed_weights import BITS, PackedWeights

FORMATS = ["float32", "bfloat16", "int8", "int4"]
U = 2.0**-24
"""The relative error of one float32 operation."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(x: Tensor, weights: PackedWeights, bias: Tensor | None, y: Tensor) -> Tensor:
    """What float32 sums of the exact products may be off, in any order, with a rounding of the result: Higham's bound
    for K terms, of sums of magnitudes in which an integer and its zero count apart."""
    W = weights.unpacked(torch.float64).abs()
    if weights.scales is not None:
        # |q| + |zero| <= |q - zero| + 2 |zero|.
        scales = weights.scales.double().abs()
        zeros = torch.zeros_like(scales) if weights.zeros is None else weights.zeros.double().abs()
        W = W + 2 * (scales * zeros).repeat_interleave(weights.group, -1)[..., : W.shape[-1]]
    size = x.double().abs() @ W.mT + (0 if bias is None else bias.double().abs())
    return (x.shape[-1] + 8) * U * size + y.double().abs() * torch.finfo(y.dtype).eps / 2


def left_away(x: Tensor, weights: PackedWeights, y: Tensor) -> Tensor:
    """What a product with int8 may be off, since a row is brought to units of its largest number: half of one each."""
    if weights.format != "int8":
        return torch.zeros_like(y, dtype=torch.float64)
    unit = x.double().abs().amax(-1, keepdim=True) * (2.0**-14 if x.dtype == torch.bfloat16 else 2.0**-22)
    W = weights.unpacked(torch.float64).abs()
    if weights.zeros is not None:
        assert weights.scales is not None
        zeros = (weights.scales.double() * weights.zeros.double()).abs()
        W = W + 2 * zeros.repeat_interleave(weights.group, -1)[..., : W.shape[-1]]
    # The largest may be a little below a power of two, and then a unit is twice as large.
    return 1.01 / 2 * unit * W.sum(-1)


formats = st.sampled_from(
    [
        ("float32", None, False),
        ("bfloat16", None, False),
        *(("int8", group, zeros) for group in (None, 32, 96) for zeros in (False, True)),
        *(("int4", group, zeros) for group in (32, 64, 128, 256, 10_000) for zeros in (False, True)),
    ]
)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@settings(max_examples=60, deadline=None)
@given(
    form=formats,
    rows=st.integers(0, 9),
    N=st.integers(1, 21),
    K=st.integers(1, 300),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    y_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(
    impl: str,
    form: tuple[str, int | None, bool],
    rows: int,
    N: int,
    K: int,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    if impl == "cpu" and native.missing_reason():
        pytest.skip("no kernels")
    format, group, zeros = form
    weights = pack_weights(randn(N, K, seed=seed) + zeros, format, group=group, zeros=zeros)
    x, bias = randn(rows, K, seed=seed + 1, dtype=x_dtype), randn(N, seed=seed + 2) if with_bias else None
    exact = packed_linear(x.double().float(), weights, bias, impl="reference", dtype=torch.float32)
    y = packed_linear(x, weights, bias, dtype=y_dtype, impl=impl)
    assert y.dtype == y_dtype
    assert y.shape == (rows, N)
    allowed = bound(x, weights, bias, exact)
    if impl == "torch" and format == "bfloat16" and x_dtype == torch.bfloat16:
        # PyTorch rounds the product to bfloat16 before the bias comes.
        allowed = allowed + exact.abs() * 2.0**-8 + (0 if bias is None else bias.abs() * 2.0**-8)
    if impl == "cpu" and rows:
        allowed = allowed + left_away(x, weights, exact)
    allowed = allowed + exact.abs().double() * torch.finfo(y_dtype).eps
    assert ((y.double() - exact.double()).abs() <= allowed).all()


@pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_other_rows_and_threads(format: str, x_dtype: torch.dtype) -> None:
    weights = pack_weights(randn(300, 520), format)
    x = randn(7, 520, seed=1, dtype=x_dtype)
    together = packed_linear(x, weights, impl="cpu")
    alone = torch.cat([packed_linear(row[None], weights, impl="cpu") for row in x])
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(packed_linear(x, weights, impl="cpu"), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")
@pytest.mark.parametrize(
    ("format", "group"),
    [("float32", None), ("bfloat16", None), ("int8", None), ("int8", 96), ("int4", 32), ("int4", 1024)],
)
@pytest.mark.parametrize("K", [700, 1030])
def test_a_row_does_not_depend_on_many_other_rows(
    format: str, group: int | None, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are multiplied with weights as they are read, more with weights made float32 for all of them, in groups
    of rows; and so many are gone through in several turns."""
    # Whatever this processor would leave to PyTorch.
    monkeypatch.setattr(packed_linear_cpu, "_few", lambda x, format: math.inf)
    weights, x = pack_weights(randn(21, K), format, group=group), randn(1100, K, seed=1, dtype=torch.bfloat16)
    whole = packed_linear(x, weights, impl="cpu", dtype=torch.float32)
    exact = packed_linear(x, weights, impl="reference", dtype=torch.float32)
    allowed = 2 * bound(x, weights, None, exact) + left_away(x, weights, exact)
    assert ((whole - exact).double().abs() <= allowed).all()
    for rows in (1, 2, 4, 11, 20, 63, 200):
        assert torch.equal(packed_linear(x[-rows:], weights, impl="cpu", dtype=torch.float32), whole[-rows:])
        assert torch.equal(packed_linear(x[:rows], weights, impl="cpu", dtype=torch.float32), whole[:rows])


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("format", FORMATS)
def test_each_row_has_its_own_matrix(impl: str, format: str) -> None:
    if impl == "cpu" and native.missing_reason():
        pytest.skip("no kernels")
    weight = randn(5, 12, 70)
    x, chosen = randn(2, 4, 70, seed=1), torch.tensor([[4, 0, 0, 3], [0, 3, 4, 4]])
    y = packed_linear(x, pack_weights(weight, format), matrix_of_row=chosen, impl=impl)
    for row, matrix, out in zip(x.flatten(0, 1), chosen.flatten(), y.flatten(0, 1), strict=True):
        single = packed_linear(row, pack_weights(weight[matrix], format), impl=impl)
        if impl == "cpu":
            assert torch.equal(out, single)
        else:
            torch.testing.assert_close(out, single)


@pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")
def test_matrices_that_no_row_has_are_not_read() -> None:
    weight = randn(3, 8, 64)
    weight[1] = torch.nan
    y = packed_linear(
        randn(2, 64), pack_weights(weight, "bfloat16"), matrix_of_row=torch.tensor([2, 0]), impl="cpu"
    )
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_rows_with_gaps_and_more_dimensions(impl: str) -> None:
    if impl == "cpu" and native.missing_reason():
        pytest.skip("no kernels")
    weights = pack_weights(randn(6, 40), "int4")
    x = randn(3, 80, 2, seed=1).mT[..., ::2]
    y = packed_linear(x, weights, impl=impl)
    assert y.shape == (3, 2, 6)
    torch.testing.assert_close(
        y, packed_linear(x.contiguous(), weights, impl="reference"), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 65, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_many_rows(rows: int, format: str) -> None:
    weights, x = pack_weights(randn(9, 130), format), randn(rows, 130, seed=1)
    y, exact = packed_linear(x, weights), packed_linear(x, weights, impl="reference")
    assert ((y - exact).double().abs() <= 2 * bound(x, weights, None, exact)).all()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("format", "group"),
    [("int8", None), ("int8", 96), ("int4", 32), ("int4", 64), ("int4", 256), ("int4", 1024)],
)
@pytest.mark.parametrize("K", [100, 130, 1000])
def test_many_rows_of_bfloat16_and_integers(format: str, group: int | None, zeros: bool, K: int) -> None:
    weights = pack_weights(randn(70, K) + zeros, format, group=group, zeros=zeros)
    x = randn(200, K, seed=1, dtype=torch.bfloat16)
    y, exact = packed_linear(x, weights), packed_linear(x, weights, impl="reference", dtype=torch.float32)
    # Weights may be rounded to bfloat16, and results are.
    rounded = x.double().abs() @ weights.unpacked(torch.float64).abs().mT * 2.0**-9
    assert (
        (y - exact).double().abs() <= 2 * bound(x, weights, None, exact) + rounded + exact.abs() * 2.0**-8
    ).all()
    bias = randn(70, seed=2)
    with_bias = packed_linear(x, weights, bias, dtype=torch.float32)
    torch.testing.assert_close(with_bias - bias, y.float(), atol=1e-4 * K, rtol=2.0**-7)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("rows", [33, 128, 129, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_bfloat16_whether_their_own_products_are_slow_or_not(
    format: str, rows: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "_bfloat16_is_slow", lambda: slow)
    weights = pack_weights(randn(300, 130), format)  # several pieces of weights where they are made float32
    x = randn(rows, 130, seed=1, dtype=torch.bfloat16)
    exact = packed_linear(x, weights, impl="reference", dtype=torch.float32)
    rounded = x.double().abs() @ weights.unpacked(torch.float64).abs().mT * 2.0**-9 + exact.abs() * 2.0**-8
    rounded += left_away(x, weights, exact)
    for impl in ["torch"] if native.missing_reason() else ["torch", "cpu"]:
        y = packed_linear(x, weights, impl=impl, dtype=torch.float32)
        assert ((y - exact).double().abs() <= 2 * bound(x, weights, None, exact) + rounded).all()
        if slow and format == "bfloat16":  # nothing but the sums is rounded
            assert ((y - exact).double().abs() <= 2 * bound(x, weights, None, exact)).all()


@pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")
def test_several_pieces_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_bfloat16_is_slow", lambda: False)
    weights, x = pack_weights(randn(70, 64), "int8"), randn(60, 64, seed=1, dtype=torch.bfloat16)
    whole = packed_linear(x, weights, impl="cpu")
    monkeypatch.setattr(packed_linear_cpu, "_PIECE", 2 * 64 * 32)
    torch.testing.assert_close(packed_linear(x, weights, impl="cpu"), whole, atol=0, rtol=2.0**-7)


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_piece(rows: int, format: str, x_dtype: torch.dtype) -> None:
    weights, x = pack_weights(randn(21, 2500), format), randn(rows, 2500, seed=1, dtype=x_dtype)
    y = packed_linear(x, weights, dtype=torch.float32)
    exact = packed_linear(x, weights, impl="reference", dtype=torch.float32)
    assert ((y - exact).double().abs() <= 2 * bound(x, weights, None, exact) + left_away(x, weights, y)).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1.0, 1e30])
def test_integers_with_rows_of_any_size(size: float, x_dtype: torch.dtype) -> None:
    weights, x = pack_weights(randn(9, 200), "int8"), size * randn(3, 200, seed=1)
    x[1] = 0
    x[2, 5] = 200 * x[2].abs().max()  # the others are small beside it
    x = x.to(x_dtype)
    y = packed_linear(x, weights, dtype=torch.float32)
    exact = packed_linear(x, weights, impl="reference", dtype=torch.float32)
    # A number may be off by half a unit, or of what float32 has at all.
    least = 2.0**-127 * weights.unpacked(torch.float64).abs().sum(1)
    allowed = bound(x, weights, None, exact) + left_away(x, weights, y).clamp_min(least)
    assert ((y - exact).double().abs() <= allowed).all()
    assert (y[1] == 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_are_not_finite_stay_among_themselves(value: float) -> None:
    weights, x = pack_weights(randn(9, 200), "int8"), randn(3, 200, seed=1)
    expected = packed_linear(x, weights)
    x[1, 7] = value
    y = packed_linear(x, weights)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[::2], expected[::2])


def test_rows_too_long_for_sums_of_32_bits() -> None:
    weights, x = pack_weights(torch.ones(2, 1_100_000), "int8"), torch.ones(1, 1_100_000)
    torch.testing.assert_close(
        packed_linear(x, weights), torch.full((1, 2), 1_100_000.0), rtol=2.0**-7, atol=0
    )


@pytest.mark.parametrize("shape", [(7, 200), (3, 7, 200)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("format", "group"), [("int8", None), ("int8", 64), ("int4", 64), ("int4", 128), ("int4", 32)]
)
def test_integers_are_near(shape: tuple[int, ...], zeros: bool, format: str, group: int | None) -> None:
    weight = randn(*shape) + 0.5
    weights = pack_weights(weight, format, group=group, zeros=zeros)
    back = weights.unpacked()
    assert weights.scales is not None
    assert back.shape == weight.shape
    steps = 2 ** BITS[format] - 2
    spread = weight.amax() - weight.amin() if zeros else 2 * weight.abs().amax()
    # Half a step of the whole range, and as much again where the zero is rounded too; and what int4 cuts off, a quarter
    # of the range at most. A scale is up to 1/64 larger than it must be.
    assert (back - weight).abs().max() <= spread / steps * (1 + 2.0**-6) * (
        (1 if zeros else 0.5) if format == "int8" else 5
    )
    error = (back - weight).square().mean().sqrt() / weight.std()
    assert error < (0.02 if format == "int8" else 0.12)
    again = pack_weights(back, format, group=group, zeros=zeros).unpacked()
    torch.testing.assert_close(again, back, atol=float(spread) / steps * 0.6, rtol=0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zeros_help_weights_that_lie_to_one_side(format: str) -> None:
    weight = randn(16, 256).abs()
    errors = [
        (pack_weights(weight, format, group=64, zeros=zeros).unpacked() - weight).square().mean()
        for zeros in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_constant_weights_are_exact(format: str, value: float) -> None:
    weight = torch.full((3, 100), value)
    back = pack_weights(weight, format).unpacked()
    torch.testing.assert_close(back, weight, rtol=2.0**-7, atol=0)


def test_bytes() -> None:
    weight = randn(64, 1024)
    assert pack_weights(weight, "float32").nbytes == 64 * 1024 * 4
    assert pack_weights(weight, "bfloat16").nbytes == 64 * 1024 * 2
    assert pack_weights(weight, "int8").nbytes == 64 * (1024 + 2)
    assert pack_weights(weight, "int4", group=64).nbytes == 64 * (512 + 2 * 16)


def test_floating_weights_are_not_copied() -> None:
    weight = randn(4, 8)
    assert pack_weights(weight, "float32").data.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("format", FORMATS)
def test_copies_compute_the_same(format: str) -> None:
    weights, x = pack_weights(randn(5, 64), format), randn(2, 64, seed=1)
    expected = packed_linear(x, weights)
    for other in (pickle.loads(pickle.dumps(weights)), copy.deepcopy(weights), weights.to("cpu")):
        assert torch.equal(packed_linear(x, other), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_compiles(format: str) -> None:
    weights, x = pack_weights(randn(5, 64), format), randn(2, 64, seed=1)

    def apply(x: Tensor) -> Tensor:
        with torch.no_grad():
            return packed_linear(x * 2, weights) + 1

    compiled = torch.compile(apply, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), apply(x))


def test_explain_names_the_kernels() -> None:
    choice = explain(packed_linear, randn(1, 64), pack_weights(randn(5, 64), "int4"))
    assert choice.impl == ("torch" if native.missing_reason() else "cpu")


def test_bad_input() -> None:
    weights, x = pack_weights(randn(5, 64), "int8"), randn(2, 64)
    with pytest.raises(ShapeError, match=r"x must be \[..., 64\]"):
        packed_linear(x[:, :63], weights)
    with pytest.raises(ShapeError, match="float16"):
        packed_linear(x.half(), weights)
    with pytest.raises(
        UnsupportedError, match="float32 and bfloat16" if native.missing_reason() is None else ""
    ):
        packed_linear(x.double(), weights, impl="cpu")
    with pytest.raises(ShapeError, match=r"bias must be \[5\]"):
        packed_linear(x, weights, torch.zeros(4))
    with pytest.raises(UnsupportedError, match="for inference"):
        packed_linear(x.requires_grad_(), weights)
    x = x.detach()
    with pytest.raises(ConfigError, match="bf16"):
        pack_weights(randn(5, 64), "bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a group of int4 is 32, 64 or a multiple of 128"):
        pack_weights(randn(5, 256), "int4", group=96)
    with pytest.raises(ConfigError, match="a group of int8 is a multiple of 32"):
        pack_weights(randn(5, 64), "int8", group=0)
    with pytest.raises(ConfigError, match="have no scales"):
        pack_weights(randn(5, 64), "bfloat16", zeros=True)
    with pytest.raises(ConfigError, match="not finite"):
        pack_weights(torch.full((2, 3), torch.inf), "int8")
    with pytest.raises(ShapeError, match="weights must be"):
        pack_weights(torch.zeros(3), "int8")
    several = pack_weights(randn(3, 5, 64), "int8")
    with pytest.raises(ShapeError, match="there are 3 matrices"):
        packed_linear(x, several)
    with pytest.raises(ConfigError, match=r"0 \.\. 2; got 3"):
        packed_linear(x, several, matrix_of_row=torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match="float16"):
        packed_linear(x, weights, dtype=torch.float16)
    with pytest.raises(ConfigError, match="no impl='fast'"):
        packed_linear(x, weights, impl="fast")
