"""Dtypes: what is computed in which, where the arguments' own differ."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.ops import Gate, dplr_rule, explain, gated_delta_rule, linear_attention, native
from intarsia.ops.decode_call import FEW
from support.linear_inputs import linear_inputs

without_kernels = pytest.mark.skipif(native.missing_reason() is not None, reason="no native kernels")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = [(FEW, None), (70, None), (40, [0, 0, 16, 16, 40])]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def raw(dtype: torch.dtype, T: int = 70) -> dict[str, Any]:
    """A call that leaves everything to the operator, whose gate is kept in `dtype`."""
    inputs = linear_inputs(B=2, T=T, H=2, HV=4, K=8, V=6, decay="channel")
    generator = torch.Generator().manual_seed(3)
    A_log, dt_bias = (torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 32))
    inputs["g"], inputs["q"] = 3 * inputs["g"] + 1, 4 * inputs["q"]
    tensors = {name: x.float() for name, x in inputs.items()}
    return {**tensors, "gate": Gate(A_log, dt_bias), "normalize": True, "beta_max": 2.0}


@pytest.mark.parametrize("T", [FEW, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gate_is_computed_in_the_dtype_of_the_computation(impl: str, dtype: torch.dtype, T: int) -> None:
    # A gate whose rate were rounded to bfloat16 would be off by 1e-3.
    call = raw(dtype, T)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    exact["gate"] = Gate(call["gate"].A_log.double(), call["gate"].dt_bias.double())
    expected = gated_delta_rule(**exact, output_final_state=True, impl="reference")
    got = gated_delta_rule(**call, output_final_state=True, impl=impl)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 4e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_reference_is_float64_whatever_it_is_given(dtype: torch.dtype) -> None:
    call = raw(torch.float32)
    tensors = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in call.items()}
    tensors["gate"] = Gate(call["gate"].A_log.to(dtype), call["gate"].dt_bias.to(dtype), -5.0)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    wide["gate"] = Gate(tensors["gate"].A_log.double(), tensors["gate"].dt_bias.double(), -5.0)
    o, state = gated_delta_rule(**tensors, output_final_state=True, impl="reference")
    expected, expected_state = gated_delta_rule(**wide, output_final_state=True, impl="reference")
    # To the bit: nothing but the results is rounded.
    assert torch.equal(o, expected.to(dtype))
    assert torch.equal(state, expected_state.float())


@pytest.mark.parametrize(("T", "edges"), LAYOUTS)
@pytest.mark.parametrize(
    ("operator", "impl"),
    [
        ("delta", "chunked"),
        ("general", "chunked"),
        *(pytest.param(operator, "cpu", marks=without_kernels) for operator in ("delta", "additive")),
    ],
)
def test_different_dtypes_are_computed_in_the_wider_one(
    impl: str, operator: str, T: int, edges: list[int] | None
) -> None:
    inputs = linear_inputs(T=T, H=2, HV=4, K=8, V=6, sequences=4 if edges else 1)
    beta = inputs.pop("beta")
    function = {"delta": gated_delta_rule, "additive": linear_attention, "general": dplr_rule}[operator]
    if operator == "delta":
        inputs["beta"] = beta
    if operator == "general":
        inputs |= {"a": 0.5 * inputs["k"].half(), "b": inputs["k"].bfloat16()}
    packing = None if edges is None else torch.tensor(edges)
    for dtypes in itertools.product(FLOATS, repeat=3):
        if len(set(dtypes)) == 1:
            continue
        tensors = dict(inputs)
        for name, dtype in zip("qkv", dtypes, strict=True):
            tensors[name] = inputs[name].to(dtype)
        o, state = function(**tensors, output_final_state=True, cu_seqlens=packing, impl=impl)
        expected, expected_state = function(
            **tensors, output_final_state=True, cu_seqlens=packing, impl="reference"
        )
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        assert (o.dtype, state.dtype) == (dtypes[2], wide)
        # A few roundings of what it is computed in, and one of the result.
        eps = torch.finfo(wide).eps
        assert relative(state, expected_state) < 40 * eps
        assert relative(o, expected) < 40 * eps + torch.finfo(o.dtype).eps


def test_gradients_have_the_dtypes_of_their_inputs(impl: str) -> None:
    inputs = linear_inputs(T=70, H=2, HV=4)
    names = ("q", "k", "v")

    def gradients(which: str, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
        leaves = [inputs[n].to(d).requires_grad_() for n, d in zip(names, dtypes, strict=True)]
        others = {n: x.float() for n, x in inputs.items() if n not in names}
        o, _ = gated_delta_rule(*leaves, **others, impl=which)
        return list(torch.autograd.grad(o.double().square().sum(), leaves))

    dtypes = (torch.float32, torch.float32, torch.float16)
    for got, expected, dtype in zip(
        gradients(impl, dtypes), gradients("reference", dtypes), dtypes, strict=True
    ):
        assert got.dtype == dtype
        assert relative(got, expected) < 20 * torch.finfo(dtype).eps


@without_kernels
def test_the_kernels_serve_float16_by_widening_it() -> None:
    inputs = {n: x.half() for n, x in linear_inputs(T=70).items()}
    assert explain(gated_delta_rule, **inputs).impl == "cpu"
    o, state = gated_delta_rule(**inputs, output_final_state=True, impl="cpu")
    expected, _ = gated_delta_rule(**inputs, output_final_state=True, impl="reference")
    assert (o.dtype, state.dtype) == (torch.float16, torch.float32)
    assert relative(o, expected) <= torch.finfo(torch.float16).eps
