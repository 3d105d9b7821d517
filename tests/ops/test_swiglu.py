"""The gated activation against its formula in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import native, swiglu
from support.budget import assert_within_budget

exact = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
compiled = pytest.mark.skipif(native.missing_reason() is not None, reason="installed without the C++ kernels")


def inputs(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, scale in (("gate", 3), ("up", 1))
    }


def run(impl: str, gate: Tensor, up: Tensor) -> list[Tensor]:
    return [swiglu(gate, up, impl=impl)]


def oracle(gate: Tensor, up: Tensor) -> list[Tensor]:
    return [gate / (1 + (-gate).exp()) * up]


def gradients(compute: Any, **x: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in x.values()]
    (y,) = compute(**dict(zip(x, leaves, strict=True)))
    # Weights that any dtype holds exactly.
    weights = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((weights * y.double()).sum(), leaves))


@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    width=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 257])),
    seed=st.integers(0, 1000),
)
def test_equals_its_formula(swiglu_impl: str, rows: list[int], width: int, seed: int) -> None:
    x, compute = inputs(*rows, width, seed=seed), functools.partial(run, swiglu_impl)
    exact(compute(**x), oracle(**x))
    exact(gradients(compute, **x), gradients(oracle, **x))


def test_derivatives(swiglu_impl: str) -> None:
    x = tuple(t.requires_grad_() for t in inputs(2, 5).values())
    compute = functools.partial(swiglu, impl=swiglu_impl)
    assert torch.autograd.gradcheck(compute, x)
    assert torch.autograd.gradgradcheck(compute, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 129), (2, 40000)], ids=str)
def test_keeps_the_error_budget(
    swiglu_impl: str, dtype: torch.dtype, shape: tuple[int, ...], trial: int
) -> None:
    compute = functools.partial(run, swiglu_impl)
    x = inputs(*shape, seed=trial)
    # The exponential, the quotient, the product.
    assert_within_budget(compute, oracle, x, dtype, stages=3, terms=1)
    assert_within_budget(
        functools.partial(gradients, compute),
        functools.partial(gradients, oracle),
        x,
        dtype,
        # Of the gate's: the exponential, a sum, the quotient, what is left of one, a product, a sum, and two products.
        stages=8,
        terms=2,
    )


def test_is_rounded_once(swiglu_impl: str) -> None:
    x = {name: t.bfloat16() for name, t in inputs(50, 100).items()}
    (wide,) = oracle(**{name: t.double() for name, t in x.items()})
    # float32's own error can only tip what lies in the middle of two neighbours.
    assert (run(swiglu_impl, **x)[0] == wide.bfloat16()).double().mean() > 0.999


def test_extreme_numbers(swiglu_impl: str) -> None:
    numbers = torch.tensor([0.0, 1e-30, 1.0, 50.0, 88.2, 88.5, 104.0, 1e10, 1e38])
    gate = torch.cat([numbers, -numbers]).repeat(3)
    up = torch.linspace(-1, 1, gate.numel())
    (y,) = run(swiglu_impl, gate, up)
    torch.testing.assert_close(
        y, torch.nn.functional.silu(gate.double()).mul(up).float(), rtol=1e-5, atol=1e-30
    )
    assert all(g.isfinite().all() for g in gradients(functools.partial(run, swiglu_impl), gate=gate, up=up))


STRANGE = {
    "every other number": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "half of a product": lambda t: torch.cat([t, t], -1).chunk(2, -1)[1],
    "one row for all": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("shape", [(6, 70), (2, 3, 19)], ids=str)
def test_strides_do_not_matter(swiglu_impl: str, how: str, shape: tuple[int, ...]) -> None:
    x, compute = inputs(*shape), functools.partial(run, swiglu_impl)
    for name in x:
        strange = STRANGE[how](x[name])
        plain = strange.clone(memory_format=torch.contiguous_format)
        exact(compute(**{**x, name: strange}), compute(**{**x, name: plain}))
    leaf = x["gate"].requires_grad_()
    compute(**x)[0].sum().backward()  # whose gradient has no strides
    (expected,) = torch.autograd.grad(oracle(**x)[0].sum(), leaf)
    exact(leaf.grad, expected)


def test_threads_change_no_bit(swiglu_impl: str) -> None:
    x = {name: t.float() for name, t in inputs(200, 700).items()}
    compute = functools.partial(run, swiglu_impl)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*compute(**x), *gradients(compute, **x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # PyTorch's own may round the ends of a thread's share in another way.
        torch.testing.assert_close(other, results[0])
        assert swiglu_impl == "torch" or all(
            torch.equal(a, b) for a, b in zip(results[0], other, strict=True)
        )


def test_nothing_but_the_inputs_is_kept() -> None:
    gate, up = (t.bfloat16().requires_grad_() for t in inputs(20, 64).values())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    if not native.missing_reason():
        assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


@compiled
def test_the_custom_operators_are_registered_as_torch_expects() -> None:
    x, operators = list(inputs(3, 5).values()), torch.ops.intarsia
    torch.library.opcheck(operators.swiglu_forward.default, tuple(t.clone().requires_grad_() for t in x))
    torch.library.opcheck(operators.swiglu_backward.default, (*x, x[0]))


def test_works_under_torch_compile(swiglu_impl: str) -> None:
    x, compute = inputs(2, 3, 19), functools.partial(run, swiglu_impl)
    torch.compiler.reset()
    traced = torch.compile(compute, backend="aot_eager", fullgraph=True)
    exact(traced(**x), compute(**x))
    exact(gradients(traced, **x), gradients(compute, **x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(2, 4)}, r"of one shape .* got \[2, 3\]"),
        ({"up": torch.zeros(2, 3).bfloat16()}, "one floating-point dtype"),
        ({"gate": torch.zeros(()), "up": torch.zeros(())}, r"\[\.\.\., F\]"),
        ({"impl": "fastest"}, "there are auto, cpu, torch"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ShapeError, ConfigError), match=message):
        swiglu(**{"gate": torch.zeros(2, 3), "up": torch.zeros(2, 3), **change})


def test_what_the_kernels_cannot_serve_falls_back_or_is_refused() -> None:
    half = torch.ones(2, 3).half()
    assert swiglu(half, half).dtype == torch.float16
    assert swiglu(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)
    if native.missing_reason():
        return
    with pytest.raises(UnsupportedError, match=r"gate is torch\.float16"):
        swiglu(half, half, impl="cpu")
    with pytest.raises(UnsupportedError, match="nothing to compute"):
        swiglu(torch.zeros(0, 3), torch.zeros(0, 3), impl="cpu")
