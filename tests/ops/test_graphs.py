"""torch.compile makes one graph for all lengths, after the one for the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.ops import Sequences, dplr_rule, gated_delta_rule, linear_attention, native, short_convolution
from support.graphs import LENGTHS, graphs
from support.linear_inputs import DECAYS, linear_inputs

CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing_reason()), reason="no native kernels"))
MOST = 3
"""The first length's, and those of all others."""


def packing(T: int) -> Sequences:
    return Sequences((T // 3, T // 2, T - T // 2 - T // 3))


def calls(decay: str, packed: bool) -> list[tuple[Tensor | Sequences | None, ...]]:
    made = []
    for T in LENGTHS:
        inputs = linear_inputs(B=1, T=T, H=1, HV=2, K=4, V=3, decay=decay, sequences=3 if packed else 1)
        tensors = [x if x is None else x.float().requires_grad_() for x in inputs.values()]
        made.append((*tensors, packing(T) if packed else None))
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("operator", "impl"),
    [
        pytest.param("delta", "chunked", marks=pytest.mark.slow),
        ("general", "chunked"),
        *(pytest.param(operator, "cpu", marks=CPU.marks) for operator in ("delta", "additive")),
    ],
)
def test_linear_operators(operator: str, impl: str, decay: str, packed: bool) -> None:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        state: Tensor,
        seqs: Sequences | None,
    ) -> Tensor:
        options = {"initial_state": state, "output_final_state": True, "cu_seqlens": seqs, "impl": impl}
        if operator == "delta":
            o, final = gated_delta_rule(q, k, v, g, beta, **options)
        elif operator == "additive":
            o, final = linear_attention(q, k, v * beta[..., None], g, **options)
        else:
            o, final = dplr_rule(q, k, v, beta[..., None] * k, k, g, **options)
        assert final is not None
        return torch.cat([o.flatten(), final.flatten()])

    # The forms in PyTorch take long to trace with their gradients, and packed ones are operators from the beginning.
    backward = impl == "cpu" or (decay == "channel" and packed)
    assert graphs(run, calls(decay, packed), backward=backward) <= MOST


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["torch", CPU])
def test_short_convolution(impl: str, packed: bool) -> None:
    def run(x: Tensor, weight: Tensor, seqs: Sequences | None) -> Tensor:
        return short_convolution(x, weight, activation="silu", cu_seqlens=seqs, impl=impl)[0]

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator).requires_grad_()
    arguments = [
        (
            torch.randn(1, T, 3, generator=generator).requires_grad_(),
            weight,
            packing(T) if packed else None,
        )
        for T in LENGTHS
    ]
    assert graphs(run, arguments, backward=True) <= MOST
