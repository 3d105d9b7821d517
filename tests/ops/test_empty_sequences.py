"""Packed sequences without a token: their final state is their initial state, and nothing else notices them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.ops import Sequences, dplr_rule, gated_delta_rule, linear_attention, short_convolution
from support.linear_inputs import linear_inputs

PACKINGS = [[0, 0, 70], [0, 70, 70], [0, 0, 0, 3, 3, 66, 70, 70]]
OPERATORS: dict[str, Any] = {"delta": gated_delta_rule, "additive": linear_attention, "general": dplr_rule}


def check(run: Any, tensors: dict[str, Tensor], edges: list[int], tolerance: float = 1e-10) -> None:
    """`run(cu_seqlens, **tensors)` gives the same with empty sequences and without them, gradients included, and hands
    the empty ones' states through."""
    lengths = Sequences.from_cu_seqlens(edges).lengths
    occupied = [n for n, length in enumerate(lengths) if length]
    empty = [n for n, length in enumerate(lengths) if not length]
    without = [0, *(edges[n + 1] for n in occupied)]

    def results(edges: list[int], chosen: list[int]) -> list[Tensor]:
        leaves = {name: x.clone() for name, x in tensors.items()}
        leaves["initial_state"] = leaves["initial_state"][chosen]
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        o, final = run(torch.tensor(edges), **leaves)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(o.shape, generator=generator, dtype=o.dtype)
        # The weight of a sequence's state depends on its number among all.
        loss = (o * weights).sum() + (final.flatten(1) * (1 + torch.tensor(chosen)[:, None])).sum()
        return [o, final, *torch.autograd.grad(loss, list(leaves.values()))]

    everyone = list(range(len(lengths)))
    o, final, *gradients = results(edges, everyone)
    expected, expected_final, *expected_gradients = results(without, occupied)
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(final[occupied], expected_final, rtol=tolerance, atol=tolerance)
    assert torch.equal(final[empty], tensors["initial_state"][empty])
    for name, got, gradient in zip(tensors, gradients, expected_gradients, strict=True):
        if name == "initial_state":
            weights = torch.ones_like(got) * (1 + torch.tensor(everyone)).view(-1, *[1] * (got.dim() - 1))
            assert torch.equal(got[empty], weights[empty])
            got = got[occupied]
        torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("edges", PACKINGS)
@pytest.mark.parametrize("operator", ["delta", "additive"])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_linear_operators(impl: str, operator: str, decay: str, edges: list[int]) -> None:
    check_linear(impl, operator, decay, edges)


@pytest.mark.parametrize("edges", PACKINGS)
def test_general_rule(edges: list[int]) -> None:
    check_linear("chunked", "general", "channel", edges)


def check_linear(impl: str, operator: str, decay: str, edges: list[int]) -> None:
    inputs = linear_inputs(T=70, H=1, HV=2, decay=decay, sequences=len(edges) - 1)
    tensors = {name: x for name, x in inputs.items() if x is not None}
    beta = tensors.pop("beta")
    if operator == "delta":
        tensors["beta"] = beta
    if operator == "general":
        tensors |= {"a": 0.5 * tensors["k"], "b": tensors["k"]}

    def run(cu_seqlens: Tensor, **x: Tensor) -> Any:
        return OPERATORS[operator](**x, output_final_state=True, cu_seqlens=cu_seqlens, impl=impl)

    check(run, tensors, edges)


@pytest.mark.parametrize("edges", PACKINGS)
def test_reference(edges: list[int]) -> None:
    def run(cu_seqlens: Tensor, **x: Tensor) -> Any:
        return gated_delta_rule(**x, output_final_state=True, cu_seqlens=cu_seqlens, impl="reference")

    check(run, linear_inputs(T=70, sequences=len(edges) - 1), edges)


@pytest.mark.parametrize("edges", PACKINGS)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_short_convolution(layer_impl: str, W: int, edges: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(1, 70, 5),
        "weight": normal(5, W),
        "initial_state": normal(len(edges) - 1, W - 1, 5),
    }

    def run(cu_seqlens: Tensor, **x: Tensor) -> Any:
        return short_convolution(
            **x, activation="silu", output_final_state=True, cu_seqlens=cu_seqlens, impl=layer_impl
        )

    check(run, tensors, edges)


def test_without_an_initial_state_the_final_one_is_zero(impl: str) -> None:
    inputs = linear_inputs(T=16, state=False)
    _, final = gated_delta_rule(
        **inputs, cu_seqlens=torch.tensor([0, 0, 16]), output_final_state=True, impl=impl
    )
    assert not final[0].any()
    assert final[1].any()
