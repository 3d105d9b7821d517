"""A few tokens behind a state, which the kernels' decode step computes in place of a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intarsia.ops import Gate, Sequences, gated_delta_rule, linear_attention, native
from intarsia.ops.decode_call import FEW
from intarsia.ops.linear_call import linear_call
from intarsia.ops.linear_cpu import cpu
from intarsia.ops.linear_few import few_tokens
from support.linear_inputs import DECAYS, linear_inputs

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no native kernels")


def call(decay: str = "channel", T: int = 1, **changes: Any) -> dict[str, Any]:
    inputs = linear_inputs(B=2, T=T, H=2, HV=4, K=5, V=3, decay=decay)
    del inputs["beta"]
    return {**inputs, **changes}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, FEW])
@pytest.mark.parametrize("erases", [False, True])
def test_equals_the_reference_and_leaves_the_state_alone(decay: str, T: int, erases: bool) -> None:
    inputs = linear_inputs(B=2, T=T, H=2, HV=4, K=5, V=3, decay=decay)
    operator = gated_delta_rule if erases else linear_attention
    if not erases:
        del inputs["beta"]
    state = inputs["initial_state"]
    kept = state.clone()
    assert few_tokens(linear_call(**inputs, output_final_state=True), cpu) is not None
    got = operator(**inputs, output_final_state=True, impl="cpu")
    expected = operator(**inputs, output_final_state=True, impl="reference")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(state, kept)
    assert got[1].data_ptr() != state.data_ptr()


@pytest.mark.parametrize("operator", [gated_delta_rule, linear_attention])
def test_takes_the_scale_that_it_is_given(operator: Any) -> None:
    inputs = call(T=3)
    assert few_tokens(linear_call(**inputs, scale=0.3, output_final_state=True), cpu) is not None
    for scale in (0.3, -2.0, 1.0):
        got, _ = operator(**inputs, scale=scale, output_final_state=True, impl="cpu")
        expected, _ = operator(**inputs, scale=scale, output_final_state=True, impl="reference")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_with_a_gate_and_normalisation() -> None:
    inputs = linear_inputs(B=2, T=3, H=2, HV=4, K=5, V=3, decay="channel")
    inputs["g"] = 3 * inputs["g"] + 1  # raw numbers of either sign
    generator = torch.Generator().manual_seed(0)
    gate = Gate(
        torch.randn(4, generator=generator).double(), torch.randn(20, generator=generator).double(), None
    )
    options = {"gate": gate, "normalize": True, "beta_max": 2.0, "output_final_state": True}
    got = gated_delta_rule(**inputs, **options, impl="cpu")
    expected = gated_delta_rule(**inputs, **options, impl="reference")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_gate_and_normalisation_beside_many_tokens(dtype: torch.dtype) -> None:
    lengths = (1, 70, 3)
    inputs = linear_inputs(B=1, T=sum(lengths), H=2, HV=4, K=5, V=3, decay="channel")
    x = {name: t if t is None else t.to(dtype) for name, t in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 5, 3, generator=generator)
    gate = Gate(torch.randn(4, generator=generator), torch.randn(20, generator=generator), None)
    options = {"gate": gate, "normalize": True, "output_final_state": True, "impl": "cpu"}
    o, after = gated_delta_rule(**{**x, "initial_state": states}, **options, cu_seqlens=Sequences(lengths))
    for n, (length, start) in enumerate(zip(lengths, Sequences(lengths).starts, strict=True)):
        own = {name: t if t is None else t[:, start : start + length] for name, t in x.items()}
        expected, state = gated_delta_rule(**{**own, "initial_state": states[n : n + 1]}, **options)
        # PyTorch's exponentials differ by a rounding with where in a row they stand.
        torch.testing.assert_close(after[n : n + 1], state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(o[:, start : start + length], expected, rtol=2**-7, atol=1e-5)


def test_parameters_without_autograd_and_gradients_with_it() -> None:
    inputs = {name: x if x is None else x.requires_grad_() for name, x in call(T=2).items()}
    with torch.no_grad():
        assert few_tokens(linear_call(**inputs, output_final_state=True), cpu) is not None
        o, _ = linear_attention(**inputs, output_final_state=True, impl="cpu")
        assert not o.requires_grad
    assert few_tokens(linear_call(**inputs, output_final_state=True), cpu) is None
    tracked, _ = linear_attention(**inputs, output_final_state=True, impl="cpu")
    torch.testing.assert_close(tracked, o, rtol=1e-10, atol=1e-10)
    tracked.sum().backward()
    assert inputs["initial_state"].grad is not None


def test_what_it_leaves_to_the_chunks() -> None:
    def served(**inputs: Any) -> bool:
        return few_tokens(linear_call(**inputs), cpu) is not None

    assert served(**call(), output_final_state=True)
    assert not served(**call())
    assert not served(**call(T=FEW + 1), output_final_state=True)
    assert not served(**call(initial_state=None), output_final_state=True)
    row = {name: x if name == "initial_state" else x[:1] for name, x in call(T=2 * FEW + 2).items()}
    assert not served(**row, output_final_state=True, cu_seqlens=torch.tensor([0, FEW + 1, 2 * FEW + 2]))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 0, 5, FEW), (0, 1, 70, 0, 3, 64, FEW + 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_sequences_continue_as_if_they_were_alone(
    decay: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """To the bit, whatever else is in the row; one that brings no token keeps its state."""
    x = linear_inputs(B=1, T=sum(lengths), H=2, HV=4, K=5, V=3, decay=decay)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: t if t is None else t.to(wide if name in ("g", "beta") else dtype) for name, t in x.items()}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(lengths), 4, 5, 3, generator=generator, dtype=wide)
    fixed = {"g"} if decay == "fixed" else set()
    o, after = gated_delta_rule(
        **{**x, "initial_state": states},
        output_final_state=True, cu_seqlens=Sequences(lengths), impl="cpu",
    )  # fmt: skip
    for n, (length, start) in enumerate(zip(lengths, Sequences(lengths).starts, strict=True)):
        if length == 0:
            assert torch.equal(after[n], states[n])
            continue
        own = {
            name: t if t is None or name in fixed else t[:, start : start + length] for name, t in x.items()
        }
        expected, state = gated_delta_rule(
            **{**own, "initial_state": states[n : n + 1]}, output_final_state=True, impl="cpu"
        )
        assert torch.equal(o[:, start : start + length], expected)
        assert torch.equal(after[n : n + 1], state)
