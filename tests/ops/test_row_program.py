"""Programs of what is done to each row alone, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops import native, pack_weights
from intarsia.ops.packed_weights import WeightFormat
from intarsia.ops.row_program import DTYPES, Product, RowProgram
from ops.conftest import INSTRUCTION_SETS, chosen

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="there are no kernels")

EPS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
"""Sums of tens of float32 numbers; a rounding or two to bfloat16."""


@pytest.fixture(scope="module", params=[f"cpu-{isa}" for isa in INSTRUCTION_SETS], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from chosen(request.param)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected).norm() <= EPS[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 37), (2, 300)])
def test_each_step(dtype: torch.dtype, rows: int, width: int) -> None:
    x, y, weight = (
        randn(rows, width, dtype=dtype),
        randn(rows, width, seed=1, dtype=dtype),
        randn(width, seed=2),
    )
    program = RowProgram(dtype)
    a, b = program.input(width), program.input(width)
    normed, activated = program.result(width), program.result(width)
    program.norm(a, weight, 1e-3, to=normed)
    program.swiglu(a, b, to=activated)
    program.add(a, b, scale=0.5)
    wide, other = x.double(), y.double()
    first, second = program(x, y)
    near(first, weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt(), dtype)
    near(second, F.silu(wide) * other, dtype)
    near(y, 0.5 * other + wide, dtype)
    assert torch.equal(x.double(), wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_side_by_side(dtype: torch.dtype, rows: int) -> None:
    """Of different formats and rows, into parts of one result, with a bias, in float32."""
    K, other_K = 70, 33
    formats: list[tuple[WeightFormat, int]] = [
        ("bfloat16", 19),
        ("int8", 40),
        ("int8", 5),
        ("int4", 64),
        ("float32", 8),
    ]
    weights = [pack_weights(randn(N, K, seed=n), name) for n, (name, N) in enumerate(formats)]
    last, bias = pack_weights(randn(21, other_K, seed=9), "bfloat16"), randn(21, seed=10)
    program = RowProgram(dtype)
    x, z = program.input(K), program.input(other_K)
    joined = program.result(sum(N for _, N in formats))
    logits = program.result(21, dtype=torch.float32)
    at = [sum(N for _, N in formats[:n]) for n in range(len(formats))]
    products = [
        Product(x, each, joined.columns(begin, each.shape[0]))
        for each, begin in zip(weights, at, strict=True)
    ]
    program.products([*products[:3], Product(z, last, logits, bias), *products[3:]])
    a, b = randn(rows, K, seed=20, dtype=dtype), randn(rows, other_K, seed=21, dtype=dtype)
    first, second = program(a, b)
    near(first, a.double() @ torch.cat([each.unpacked(torch.float64) for each in weights]).mT, dtype)
    near(second, b.double() @ last.unpacked(torch.float64).mT + bias.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_product_of_each_piece(dtype: torch.dtype, format: WeightFormat) -> None:
    E, N, K, step, rows = 3, 17, 40, 50, 4
    weights = pack_weights(randn(E, N, K), format)
    program = RowProgram(dtype)
    x, to = program.input(E * step), program.result(E * (N + 10))
    program.product_of_each(x, weights, to, x_step=step, to_step=N + 10)
    program.copy(x.columns(K, x.width - K), to.columns(N, to.width - N), 10, E, x_step=step, to_step=N + 10)
    a = randn(rows, E * step, seed=1, dtype=dtype)
    (got,) = program(a)
    pieces = a.double().unflatten(1, (E, step))
    expected = torch.einsum("rek,enk->ren", pieces[..., :K], weights.unpacked(torch.float64))
    near(got.unflatten(1, (E, -1))[..., :N].flatten(1), expected.flatten(1), dtype)
    assert torch.equal(got.unflatten(1, (E, -1))[..., N:], a.unflatten(1, (E, step))[..., K:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_bit_among_others_and_on_threads(dtype: torch.dtype) -> None:
    program = RowProgram(dtype)
    h = program.norm(program.input(256), randn(256), 1e-5)
    hidden = [program.product(h, pack_weights(randn(700, 256, seed=n), "int8")) for n in range(2)]
    y = program.product(program.swiglu(*hidden), pack_weights(randn(256, 700, seed=3), "bfloat16"))
    program.copy(y, program.result(256), 256)
    x, threads = randn(9, 256, seed=5, dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (together,) = program(x)
        torch.set_num_threads(1)
        for n in range(9):
            assert torch.equal(program(x[n : n + 1])[0], together[n : n + 1])
    finally:
        torch.set_num_threads(threads)
    assert program(x[:0])[0].shape == (0, 256)


def test_rows_may_have_gaps_between_them() -> None:
    program = RowProgram(torch.float32)
    x = program.input(20)
    program.norm(x, randn(20), 1e-5, to=program.result(20))
    wide = randn(4, 50)
    assert torch.equal(program(wide[:, 7:27])[0], program(wide[:, 7:27].contiguous())[0])


def test_what_does_not_fit_is_an_error() -> None:
    program = RowProgram(torch.float32)
    x, weights = program.input(20), pack_weights(randn(8, 30), "float32")
    with pytest.raises(ShapeError, match=r"columns 15 \.\. 24 of 20"):
        x.columns(15, 10)
    with pytest.raises(ShapeError, match="a norm"):
        program.norm(x, randn(19), 1e-5)
    with pytest.raises(ShapeError, match="a product's rows"):
        program.product(x, weights)
    with pytest.raises(ShapeError, match="a sum"):
        program.add(x, program.room(19))
    with pytest.raises(ShapeError, match="outside of their buffer"):
        program.product_of_each(x, pack_weights(randn(2, 4, 15), "float32"), program.room(8))
    with pytest.raises(ShapeError, match="outside of their buffer"):
        program.copy(x, program.room(10), 11)
    program.norm(x, randn(20), 1e-5, to=x)
    kept = randn(3, 20)
    for wrong in (kept[:, :19], kept.double(), kept.mT.contiguous().mT, kept[0]):
        before = wrong.clone()
        with pytest.raises(ShapeError, match="the program takes rows of"):
            program(wrong)
        assert torch.equal(wrong, before)
    with pytest.raises(ShapeError, match="the program takes rows of"):
        program(kept, kept)
