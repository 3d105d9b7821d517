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
from intarsia.ops.row_program import DTYPES, Choice, Product, RowProgram
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
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("softmax", "groups", "biased"), [(False, 1, False), (True, 4, False), (False, 2, True)]
)
def test_experts(dtype: torch.dtype, rows: int, softmax: bool, groups: int, biased: bool) -> None:
    E, F_, D, active = 8, 20, 40, 2
    gate_up, down = (
        pack_weights(randn(E, 2 * F_, D, seed=1), "int8"),
        pack_weights(randn(E, D, F_, seed=2), "bfloat16"),
    )
    choice = Choice(
        active, groups, 1 if groups > 1 else groups, softmax, biased, True, 2.5, 0.3 * randn(E, seed=3)
    )
    program = RowProgram(dtype)
    x, logits, result = program.input(D), program.room(E, torch.float32), program.result(D)
    program.products([Product(x, pack_weights(randn(E, D, seed=4), "float32"), logits)])
    program.copy(program.experts(x, logits, choice, gate_up, down), result, D)
    a = randn(rows, D, seed=5, dtype=dtype)
    (got,) = program(a)
    raw = a.double() @ randn(E, D, seed=4).double().mT
    scores = raw.softmax(-1) if softmax else raw.sigmoid()
    with_bias = scores + choice.bias.double()
    grouped = with_bias.unflatten(-1, (groups, -1))
    best = (
        grouped.topk(2, dim=-1).values.sum(-1).argmax(-1)
        if groups > 1
        else torch.zeros(rows, dtype=torch.int64)
    )
    for row in range(rows):
        allowed = torch.full((groups, E // groups), -torch.inf, dtype=torch.float64)
        allowed[best[row]] = grouped[row, best[row]]
        chosen = allowed.flatten().topk(active).indices
        weights = (with_bias if biased else scores)[row, chosen]
        weights = 2.5 * weights / weights.sum()
        expected = torch.zeros(D, dtype=torch.float64)
        for e, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (gate_up.unpacked(torch.float64)[e] @ a[row].double()).chunk(2)
            expected += weight * (down.unpacked(torch.float64)[e] @ (F.silu(gate) * up))
        near(got[row], expected, dtype)


def test_logits_that_are_no_numbers_choose_experts_that_there_are() -> None:
    program = RowProgram(torch.float32)
    x, logits = program.input(3), program.room(4, torch.float32)
    program.products([Product(x, pack_weights(randn(4, 3), "float32"), logits)])
    choice = Choice(2, 1, 1, True, False, True, 1.0, torch.zeros(4))
    experts = pack_weights(randn(4, 4, 3), "float32"), pack_weights(randn(4, 3, 2), "float32")
    program.copy(program.experts(x, logits, choice, *experts), program.result(3), 3)
    assert program(torch.full((2, 3), torch.nan))[0].isnan().all()


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
