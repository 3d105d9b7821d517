"""The gated RMSNorm against its formula in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import gated_rms_norm, native
from support.budget import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
GATES = ["sigmoid", "swish", None]
EPS = 1e-5
compiled = pytest.mark.skipif(native.missing_reason() is not None, reason="installed without the C++ kernels")
every_gate = pytest.mark.parametrize("gate", GATES)
exact = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def inputs(*shape: int, gate: str | None, seed: int = 0) -> dict[str, Tensor]:
    """o, weight and, with a gate, z; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {"o": normal(*shape), "weight": 1 + 0.1 * normal(shape[-1])}
    return {**x, "z": 3 * normal(*shape)} if gate else x


def run(impl: str, gate: Any, *, o: Tensor, weight: Tensor, z: Tensor | None = None) -> list[Tensor]:
    return [gated_rms_norm(o, z, weight, eps=EPS, gate=gate, impl=impl)]


def oracle(gate: str | None, *, o: Tensor, weight: Tensor, z: Tensor | None = None) -> list[Tensor]:
    """The formula."""
    y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + EPS) * weight
    return [y if z is None else y * (torch.sigmoid(z) if gate == "sigmoid" else F.silu(z))]


def gradients(compute: Any, **x: Tensor) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    (y,) = compute(**leaves)
    # Weights that any dtype holds exactly.
    weights = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1))
    (weights * y.double()).sum().backward()
    return [t.grad for t in leaves.values()]


def check(impl: str, gate: str | None, x: dict[str, Tensor]) -> None:
    exact(run(impl, gate, **x)[0], oracle(gate, **x)[0])
    got = gradients(functools.partial(run, impl, gate), **x)
    expected = gradients(functools.partial(oracle, gate), **x)
    for name, a, b in zip(x, got, expected, strict=True):
        exact(a, b, msg=lambda m, n=name: f"{n}: {m}")


@given(
    rows=st.lists(st.integers(1, 5), max_size=5),
    V=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 128, 256])),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 1000),
)
def test_equals_its_formula(layer_impl: str, rows: list[int], V: int, gate: str | None, seed: int) -> None:
    check(layer_impl, gate, inputs(*rows, V, gate=gate, seed=seed))


@every_gate
@pytest.mark.parametrize("shape", [(2, 300, 3, 128), (1000, 100), (3, 40000)], ids=str)
def test_equals_its_formula_where_the_work_is_divided(
    layer_impl: str, gate: str | None, shape: tuple[int, ...]
) -> None:
    check(layer_impl, gate, inputs(*shape, gate=gate))


@every_gate
def test_gradcheck(layer_impl: str, gate: str | None) -> None:
    x = inputs(2, 3, 5, gate=gate)
    names = list(x)
    assert torch.autograd.gradcheck(
        lambda *t: run(layer_impl, gate, **dict(zip(names, t, strict=True)))[0],
        tuple(t.requires_grad_() for t in x.values()),
    )


@every_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [64, 100])
def test_keeps_the_error_budget(
    layer_impl: str, gate: str | None, dtype: torch.dtype, V: int, trial: int
) -> None:
    assert_within_budget(
        functools.partial(run, layer_impl, gate),
        functools.partial(oracle, gate),
        inputs(4, 50, V, gate=gate, seed=trial),
        dtype,
    )


@every_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_keep_the_error_budget(
    layer_impl: str, gate: str | None, dtype: torch.dtype, trial: int
) -> None:
    assert_within_budget(
        functools.partial(gradients, functools.partial(run, layer_impl, gate)),
        functools.partial(gradients, functools.partial(oracle, gate)),
        inputs(4, 50, 64, gate=gate, seed=trial),
        dtype,
        terms=200,  # the weight's gradient sums over the rows
    )


def test_is_rounded_once(layer_impl: str) -> None:
    x = {name: t.bfloat16() for name, t in inputs(4, 50, 64, gate="swish").items()}
    (y,) = run(layer_impl, "swish", **x)
    (wide,) = oracle("swish", **{name: t.double() for name, t in x.items()})
    # float32's own error can only tip what lies in the middle of two neighbours.
    assert (y == wide.bfloat16()).double().mean() > 0.999


def test_extreme_numbers(layer_impl: str) -> None:
    numbers = torch.tensor([0.0, 1e-30, 1.0, 50.0, 88.2, 88.5, 104.0, 1e10, 3e38])
    z = torch.cat([numbers, -numbers]).requires_grad_()
    for gate in ("sigmoid", "swish"):
        o = torch.linspace(-2, 2, z.numel()).requires_grad_()
        y = gated_rms_norm(o, z, torch.ones_like(o), eps=EPS, gate=gate, impl=layer_impl)
        (expected,) = oracle(
            gate, o=o.detach().double(), weight=torch.ones(1).double().expand(o.shape), z=z.detach()
        )
        torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-30)
        (gradient,) = torch.autograd.grad(y[:8].sum(), z)
        assert torch.isfinite(gradient).all()
    zero = torch.zeros(3, 16, requires_grad=True)
    y = gated_rms_norm(zero, None, torch.ones(16), eps=EPS, gate=None, impl=layer_impl)
    y.sum().backward()
    assert torch.equal(y, zero)
    torch.testing.assert_close(zero.grad, torch.full_like(zero, EPS**-0.5))


@every_gate
def test_works_under_torch_compile(layer_impl: str, gate: str | None) -> None:
    x = inputs(2, 7, 3, 8, gate=gate)
    compute = functools.partial(run, layer_impl, gate)
    torch.compiler.reset()  # which allows a few versions of one function
    # aot_eager traces forward and backward as inductor does, without compiling C++ for each shape.
    traced = torch.compile(compute, backend="aot_eager", fullgraph=True)
    exact(traced(**x)[0], compute(**x)[0])
    for got, expected in zip(gradients(traced, **x), gradients(compute, **x), strict=True):
        exact(got, expected)


STRANGE = {
    "every other number": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "heads before tokens": lambda t: t.movedim(-2, 0).contiguous().movedim(0, -2),
    "some heads of more": lambda t: F.pad(t, (0, 0, 1, 2))[..., 1:-2, :],
    "some columns of a wider tensor": lambda t: F.pad(t, (3, 2))[..., 3:-2],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (1, 9, 16), (2, 2, 3, 4, 5)], ids=str)
def test_strides_and_modes_do_not_matter(
    layer_impl: str, mode: Any, how: str, shape: tuple[int, ...]
) -> None:
    x = inputs(*shape, gate="swish")
    # Each of them laid out in another way.
    for name in ("o", "z"):
        strange = {**x, name: STRANGE[how](x[name])}
        with mode():
            got = run(layer_impl, "swish", **strange)
        exact(got, run(layer_impl, "swish", **x))
        compute = functools.partial(run, layer_impl, "swish")
        for a, b in zip(gradients(compute, **strange), gradients(compute, **x), strict=True):
            exact(a, b)


def test_expanded_inputs_and_gradients(layer_impl: str) -> None:
    x = inputs(1, 5, 8, gate="sigmoid")
    o = x["o"].expand(3, -1, -1).requires_grad_()
    (y,) = run(layer_impl, "sigmoid", o=o, weight=x["weight"], z=x["z"].expand(3, -1, -1))
    y.sum().backward()  # whose gradient has no strides
    exact(y[2:], run(layer_impl, "sigmoid", **x)[0])


@every_gate
def test_threads_change_no_bit(layer_impl: str, gate: str | None) -> None:
    x = {name: t.float() for name, t in inputs(500, 8, 128, gate=gate).items()}
    compute = functools.partial(run, layer_impl, gate)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*compute(**x), *gradients(compute, **x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # PyTorch's own sums may take their order from the number of threads.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
            assert layer_impl == "torch" or torch.equal(a, b)


@pytest.mark.parametrize("o_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_may_differ(
    layer_impl: str, o_dtype: torch.dtype, z_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    dtypes = {"o": o_dtype, "z": z_dtype, "weight": weight_dtype}
    x = {name: t.to(dtypes[name]) for name, t in inputs(3, 4, 16, gate="sigmoid").items()}
    (y,) = run(layer_impl, "sigmoid", **x)
    assert y.dtype == x["o"].dtype
    (expected,) = oracle("sigmoid", **{name: t.double() for name, t in x.items()})
    torch.testing.assert_close(y, expected.to(y.dtype))
    for t, gradient in zip(
        x.values(), gradients(functools.partial(run, layer_impl, "sigmoid"), **x), strict=True
    ):
        assert gradient.dtype == t.dtype


@compiled
@every_gate
def test_the_custom_operators_are_registered_as_torch_expects(gate: str | None) -> None:
    x = inputs(2, 3, 2, 4, gate=gate)
    arguments = (x["o"], x.get("z"), x["weight"])
    operators = torch.ops.intarsia
    leaves = tuple(None if t is None else t.clone().requires_grad_() for t in arguments)
    torch.library.opcheck(operators.norm_forward.default, (*leaves, EPS, gate or "none"))
    torch.library.opcheck(operators.norm_backward.default, (*arguments, EPS, gate or "none", x["o"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight \[V\]"),
        ({"z": None}, "z is missing"),
        ({"gate": None}, "z is given"),
        ({"z": torch.zeros(2, 3)}, "z must have the shape of o"),
        ({"o": torch.zeros(3, 3, dtype=torch.int64)}, "floating-point"),
        ({"gate": "silu"}, "gate must be"),
        ({"impl": "fastest"}, "there are auto, cpu, torch"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    x: dict[str, Any] = {"o": torch.zeros(3, 3), "z": torch.zeros(3, 3), "weight": torch.ones(3), "eps": EPS}
    with pytest.raises((ShapeError, ConfigError), match=message):
        gated_rms_norm(**{**x, **change})


def test_what_the_kernels_cannot_serve_falls_back_or_is_refused() -> None:
    weight, half = torch.ones(3), torch.randn(2, 3).half()
    call = functools.partial(gated_rms_norm, z=None, weight=weight, eps=EPS, gate=None)
    assert call(half).dtype == torch.float16
    assert call(torch.zeros(0, 3)).shape == (0, 3)
    if native.missing_reason():
        return
    with pytest.raises(UnsupportedError, match=r"o is torch\.float16"):
        call(half, impl="cpu")
    with pytest.raises(UnsupportedError, match="nothing to compute"):
        call(torch.zeros(0, 3), impl="cpu")
    with pytest.raises(UnsupportedError, match="on meta"):
        call(torch.zeros(2, 3, device="meta"), impl="cpu")
