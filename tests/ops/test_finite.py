"""What a token makes infinite or NaN leaves every bit of the outputs before it, in each implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.ops import dplr_rule, gated_delta_rule, gated_rms_norm, linear_attention, short_convolution
from support.linear_inputs import linear_inputs

NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 3e38]
"""And the largest numbers, whose products overflow."""


def given(rule: str, decay: str, dtype: torch.dtype, *, T: int = 100, sequences: int = 1) -> dict[str, Any]:
    inputs = linear_inputs(T=T, H=2, HV=4, K=16, V=12, decay=decay, sequences=sequences)
    if rule != "delta":
        inputs.pop("beta")
    if rule == "general":
        inputs["a"], inputs["b"] = (0.1 * linear_inputs(T=T, K=16, seed=n)["k"] for n in (1, 2))
    return {name: None if x is None else x.to(dtype) for name, x in inputs.items()}


RULES = {"additive": linear_attention, "delta": gated_delta_rule, "general": dplr_rule}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["none", "fixed", "head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("token", [37, 79])
def test_not_from_a_later_token(impl: str, rule: str, decay: str, dtype: torch.dtype, token: int) -> None:
    if rule == "general" and impl == "cpu":
        pytest.skip("the kernels do not have the general rule")
    inputs = given(rule, decay, dtype)
    o, _ = RULES[rule](**inputs, impl=impl)
    tokens = [n for n in inputs if n != "initial_state" and inputs[n] is not None]
    for name in tokens if decay != "fixed" else [n for n in tokens if n != "g"]:
        for bad in NOT_FINITE:
            changed = inputs[name].clone()
            changed[:, token] = bad
            got, _ = RULES[rule](**{**inputs, name: changed}, impl=impl)
            assert torch.equal(got[:, :token], o[:, :token]), (name, bad)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_only_where_it_reaches(impl: str, rule: str, decay: str) -> None:
    """A value that is not finite stays in its channel, a key in its heads, a query in its token, and all of them in
    their sequence; different channels go one after the other."""
    if rule == "general" and impl == "cpu":
        pytest.skip("the kernels do not have the general rule")
    inputs = given(rule, decay, torch.float32, sequences=2)
    edges = torch.tensor([0, 60, 100])
    o, _ = RULES[rule](**inputs, cu_seqlens=edges, impl=impl)
    expected = torch.ones_like(o, dtype=torch.bool)
    changed = {name: inputs[name].clone() for name in ("q", "k", "v")}
    for token, head, channel in ((10, 0, 3), (13, 0, 4), (70, 2, 5)):
        changed["v"][:, token, head, channel] = torch.nan
        expected[:, token : 60 if token < 60 else 100, head, channel] = False
    changed["k"][:, 20, 1, 2] = torch.inf
    expected[:, 20:60, 2:] = False
    changed["q"][:, 65, 0, 7] = torch.nan
    expected[:, 65, :2] = False
    got, _ = RULES[rule](**{**inputs, **changed}, cu_seqlens=edges, impl=impl)
    assert torch.equal(got.isfinite(), expected)
    assert torch.equal(got[expected], o[expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_through_the_convolution(layer_impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 70, 40, generator=generator), torch.randn(40, 4, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    y, _ = short_convolution(x, weight, activation="silu", impl=layer_impl)
    for bad in NOT_FINITE:
        changed = x.clone()
        changed[:, 33, ::3] = bad
        got, _ = short_convolution(changed, weight, activation="silu", impl=layer_impl)
        assert torch.equal(got[:, :33], y[:, :33])
        assert torch.equal(got[:, 37:], y[:, 37:])
        assert torch.equal(got[..., 1::3], y[..., 1::3])


def test_not_through_the_norm(layer_impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    o, z = (torch.randn(2, 20, 3, 24, generator=generator) for _ in range(2))
    weight = torch.randn(24, generator=generator)

    def norm(o: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(o, z, weight, eps=1e-5, gate="sigmoid", impl=layer_impl)

    y = norm(o, z)
    for bad in NOT_FINITE:
        for which in (0, 1):
            both = [o.clone(), z.clone()]
            both[which][0, 7, 1, 5] = bad
            same = torch.ones(2, 20, 3, dtype=torch.bool)
            same[0, 7, 1] = False
            assert torch.equal(norm(*both)[same], y[same])
