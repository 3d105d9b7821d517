"""Each argument of each operator has its gradient where nothing else is trained, on every path that a call can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.ops import (
    Gate,
    dplr_rule,
    gated_delta_rule,
    gated_rms_norm,
    linear_attention,
    short_convolution,
)
from intarsia.ops import native as kernels
from intarsia.ops.decode_call import FEW
from support.linear_inputs import DECAYS, linear_inputs

# Which path a call takes does not depend on the instruction set.
native = pytest.param(
    "cpu", marks=pytest.mark.skipif(bool(kernels.missing_reason()), reason="no native kernels")
)
Tensors = dict[str, Tensor]
Run = Callable[..., tuple[Tensor, Tensor]]


def linear(operator: str, T: int, decay: str, gated: bool) -> tuple[Run, Tensors]:
    """An operator as a function of `impl` and its tensors, those of the gate among them; and tensors for it."""
    inputs = linear_inputs(B=2, T=T, H=1, HV=2, K=3, V=4, decay=decay)
    beta = inputs.pop("beta")
    tensors = {name: x for name, x in inputs.items() if x is not None}
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if operator == "delta":
        assert beta is not None
        tensors["beta"] = beta
    if operator == "general":
        tensors |= {"a": 0.1 * normal(2, T, 2, 3), "b": normal(2, T, 1, 3)}
    if gated:
        tensors |= {"A_log": normal(2), "dt_bias": normal(2 if decay == "head" else 6)}
    function = {"delta": gated_delta_rule, "additive": linear_attention, "general": dplr_rule}[operator]

    def run(
        impl: str, A_log: Tensor | None = None, dt_bias: Tensor | None = None, **x: Tensor
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if A_log is None else {"gate": Gate(A_log, dt_bias, -5.0)}
        o, state = function(**x, **options, output_final_state=True, impl=impl)
        assert state is not None
        return o, state

    return run, tensors


def gradient(run: Run, impl: str, tensors: Tensors, name: str) -> Tensor:
    """Of `name`, which alone is trained, from outputs and final state with fixed weights."""
    trained = tensors[name].clone().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64)
    for out in run(impl, **{**tensors, name: trained}):
        loss = loss + (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    (result,) = torch.autograd.grad(loss, trained)
    return result


@pytest.mark.parametrize("T", [1, 2, FEW, FEW + 1, 70])
@pytest.mark.parametrize(
    ("decay", "gated"), [*((d, False) for d in DECAYS), ("head", True), ("channel", True)]
)
@pytest.mark.parametrize("operator", ["delta", "additive"])
@pytest.mark.parametrize("impl", ["chunked", native])
def test_linear_operators(impl: str, operator: str, decay: str, gated: bool, T: int) -> None:
    check_linear(impl, operator, T, decay, gated)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [2, 70])
def test_general_rule(decay: str, T: int) -> None:
    check_linear("chunked", "general", T, decay, gated=False)


def check_linear(impl: str, operator: str, T: int, decay: str, gated: bool) -> None:
    run, tensors = linear(operator, T, decay, gated)
    for name in tensors:
        expected = gradient(run, "reference", tensors, name)
        assert expected.any()
        torch.testing.assert_close(gradient(run, impl, tensors, name), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("impl", [native])
def test_short_convolution(impl: str, T: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"x": normal(2, T, 3), "weight": normal(3, 4), "initial_state": normal(2, 3, 3)}

    def run(impl: str, **x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = short_convolution(**x, activation="silu", output_final_state=True, impl=impl)
        assert state is not None
        return y, state

    for name in tensors:
        expected = gradient(run, "torch", tensors, name)
        assert expected.any()
        torch.testing.assert_close(gradient(run, impl, tensors, name), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", [native])
def test_gated_norm(impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("o", (2, 3, 2, 5)), ("z", (2, 3, 2, 5)), ("weight", (5,)))
    }

    def run(impl: str, **x: Tensor) -> tuple[Tensor]:
        return (gated_rms_norm(**x, eps=1e-5, gate="swish", impl=impl),)

    for name in tensors:
        expected = gradient(run, "torch", tensors, name)
        assert expected.any()
        torch.testing.assert_close(gradient(run, impl, tensors, name), expected, rtol=1e-9, atol=1e-9)
