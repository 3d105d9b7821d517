"""The linear operators: every implementation against the float64 reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import explain, gated_delta_rule, linear_attention
from support.budget import assert_within_budget
from support.linear_inputs import DECAYS, REGIMES, linear_inputs

IMPLEMENTATIONS = ["chunked"]
OPERATORS = {"delta": gated_delta_rule, "additive": linear_attention}
DTYPES = [torch.float32, torch.bfloat16]


def runner(operator: str, impl: str, cu_seqlens: Tensor | None = None) -> Any:
    """The operator as a function of its tensors that returns output and final state."""

    def run(beta: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        erasing = {"beta": beta} if operator == "delta" else {}
        return OPERATORS[operator](
            **inputs, **erasing, output_final_state=True, cu_seqlens=cu_seqlens, impl=impl
        )

    return run


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_equals_the_reference(impl: str, operator: str, decay: str, T: int) -> None:
    inputs = linear_inputs(B=2, T=T, H=2, HV=4, decay=decay)
    for got, expected in zip(
        runner(operator, impl)(**inputs), runner(operator, "reference")(**inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_keeps_the_error_budget_at_any_decay(
    impl: str, operator: str, dtype: torch.dtype, regime: Any, decay: str
) -> None:
    inputs = linear_inputs(T=300, K=64, V=32, decay=decay, regime=regime)
    assert_within_budget(runner(operator, impl), runner(operator, "reference"), inputs, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_the_error_budget_over_a_thousand_tokens(impl: str, dtype: torch.dtype) -> None:
    inputs = linear_inputs(T=1000, K=64, V=64, decay="channel", beta_max=2.0)
    assert_within_budget(runner("delta", impl), runner("delta", "reference"), inputs, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    T=st.integers(1, 150),
    B=st.integers(1, 3),
    H=st.integers(1, 2),
    group=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    decay=st.sampled_from(DECAYS),
    regime=st.sampled_from(REGIMES),
    operator=st.sampled_from(sorted(OPERATORS)),
    state=st.booleans(),
    beta_max=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_whatever_the_shape(
    impl: str, operator: str, H: int, group: int, **shape: Any
) -> None:
    inputs = linear_inputs(H=H, HV=H * group, **shape)
    for got, expected in zip(
        runner(operator, impl)(**inputs), runner(operator, "reference")(**inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    operator=st.sampled_from(sorted(OPERATORS)),
    decay=st.sampled_from(DECAYS),
    state=st.booleans(),
)
def test_packed_sequences_do_not_see_each_other(
    impl: str, lengths: list[int], operator: str, decay: str, state: bool
) -> None:
    inputs = linear_inputs(T=sum(lengths), decay=decay, sequences=len(lengths), state=state)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    o, final = runner(operator, impl, edges)(**inputs)
    per_token = ("q", "k", "v", "beta") if decay == "fixed" else ("q", "k", "v", "g", "beta")
    for n, (start, stop) in enumerate(itertools.pairwise(edges)):
        alone = {
            name: x[:, start:stop] if x is not None and name in per_token else x for name, x in inputs.items()
        }
        if state:
            alone["initial_state"] = inputs["initial_state"][n : n + 1]
        o_n, final_n = runner(operator, impl)(**alone)
        torch.testing.assert_close(o[:, start:stop], o_n, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(final[n : n + 1], final_n, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(T=st.integers(2, 200), cut=st.integers(1, 199), operator=st.sampled_from(sorted(OPERATORS)))
def test_a_sequence_can_be_split_anywhere(impl: str, T: int, cut: int, operator: str) -> None:
    cut = min(cut, T - 1)
    inputs = linear_inputs(T=T)
    first = {n: x if n == "initial_state" else x[:, :cut] for n, x in inputs.items()}
    o_1, middle = runner(operator, impl)(**first)
    second = {n: middle if n == "initial_state" else x[:, cut:] for n, x in inputs.items()}
    o_2, final = runner(operator, impl)(**second)
    o, expected = runner(operator, impl)(**inputs)
    torch.testing.assert_close(torch.cat([o_1, o_2], dim=1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(cut=st.integers(1, 199), regime=st.sampled_from(REGIMES), seed=st.integers(0, 99))
def test_the_future_changes_no_bit_of_the_past(
    impl: str, operator: str, decay: str, dtype: torch.dtype, cut: int, regime: Any, seed: int
) -> None:
    inputs = linear_inputs(T=200, K=16, V=8, decay=decay, regime=regime, seed=seed)
    other = linear_inputs(T=200, K=16, V=8, decay=decay, regime="strong", seed=seed + 1)

    def convert(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    past = {name: convert(x) for name, x in inputs.items()}
    changed = {
        name: x
        if x is None or name == "initial_state"
        else torch.cat([x[:, :cut], 3 * convert(other[name])[:, cut:]], 1)
        for name, x in past.items()
    }
    assert torch.equal(
        runner(operator, impl)(**past)[0][:, :cut], runner(operator, impl)(**changed)[0][:, :cut]
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("regime", ["kda", "minus five", "resets", "all lost"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_the_reference(
    impl: str, operator: str, decay: str, regime: Any, packed: bool
) -> None:
    lengths = [3, 66, 1, 64] if packed else None
    inputs = linear_inputs(T=134, H=1, HV=2, decay=decay, regime=regime, sequences=4 if packed else None)
    edges = torch.tensor([0, *lengths]).cumsum(0) if lengths else None
    generator = torch.Generator().manual_seed(1)
    names = [n for n, x in inputs.items() if x is not None and (n != "beta" or operator == "delta")]

    def gradients(which: str) -> dict[str, Tensor]:
        leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
        outputs = runner(operator, which, edges)(**leaves)
        weights = [torch.randn(o.shape, generator=generator.manual_seed(1), dtype=o.dtype) for o in outputs]
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
        return {n: leaves[n].grad for n in names}

    expected = gradients("reference")
    for name, gradient in gradients(impl).items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_keep_the_error_budget(impl: str, dtype: torch.dtype, regime: Any) -> None:
    def gradients(which: str, **inputs: Tensor) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        o, final = gated_delta_rule(**leaves, output_final_state=True, impl=which)
        (o.square().sum() + final.square().sum()).backward()
        return [x.grad for x in leaves.values()]

    inputs = linear_inputs(T=130, K=32, V=32, regime=regime)
    # Backward runs through the forward's products and as many again.
    assert_within_budget(
        functools.partial(gradients, impl), functools.partial(gradients, "reference"), inputs, dtype, stages=8
    )


def test_gradcheck() -> None:
    inputs = {n: x.requires_grad_() for n, x in linear_inputs(T=9, H=1, HV=2, K=3, V=2).items()}
    assert torch.autograd.gradcheck(
        lambda *a: gated_delta_rule(*a[:5], initial_state=a[5], output_final_state=True, impl="chunked"),
        tuple(inputs.values()),
    )


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_works_under_torch_compile(decay: str) -> None:
    inputs = {n: x.float() for n, x in linear_inputs(T=130, decay=decay).items()}
    run = functools.partial(gated_delta_rule, output_final_state=True)
    leaves = [{n: x.clone().requires_grad_() for n, x in inputs.items()} for _ in range(2)]
    # aot_eager traces forward and backward as inductor does, without compiling C++ for each shape.
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [f(**each) for f, each in zip((run, compiled), leaves, strict=True)]
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    for result in results:
        (result[0].sum() + result[1].sum()).backward()
    for name in inputs:
        torch.testing.assert_close(leaves[1][name].grad, leaves[0][name].grad)


def test_memory_grows_with_the_tokens_and_not_faster() -> None:
    """No tensor inside is larger than a few times the inputs: nothing of size [T, C, K] or [T, T]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor) and x.untyped_storage().size():
                    self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
            return result

    T, H, K = 4096, 1, 64
    inputs = {n: x.float().requires_grad_() for n, x in linear_inputs(T=T, H=H, HV=H, K=K, V=K).items()}
    with Largest() as largest:
        o, _ = gated_delta_rule(**inputs)
        o.sum().backward()
    assert largest.elements <= 2 * T * H * K


def test_state_and_output_dtypes() -> None:
    for dtype, state in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for impl in ("reference", "chunked"):
            inputs = {n: x.to(dtype) for n, x in linear_inputs(T=3).items()}
            o, final = gated_delta_rule(**inputs, output_final_state=True, impl=impl)
            assert o.dtype == dtype
            assert final.dtype == state
            assert gated_delta_rule(**inputs, impl=impl)[1] is None


def test_beta_defaults_to_one_and_scale_to_the_root_of_the_key_dimension() -> None:
    x = linear_inputs(T=5, K=16, state=False)
    q, k, v, g = x["q"], x["k"], x["v"], x["g"]
    plain = gated_delta_rule(q, k, v, g)[0]
    torch.testing.assert_close(
        plain, gated_delta_rule(q, k, v, g, torch.ones(1, 5, 2, dtype=torch.float64))[0]
    )
    torch.testing.assert_close(plain, gated_delta_rule(4 * q, k, v, g, scale=1 / 16)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 5, 2, 9)}, "k must have the shape of q"),
        ({"v": torch.zeros(1, 4, 2, 12)}, "v must begin with"),
        ({"v": torch.zeros(1, 5, 3, 12)}, "multiple of the query heads"),
        ({"g": torch.zeros(1, 5, 2, 7)}, "g must be None or of shape"),
        ({"beta": torch.zeros(1, 5)}, "beta must be"),
        ({"initial_state": torch.zeros(1, 2, 12, 8)}, "transpose it"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens describes one row of 4"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 5])}, "at least one token"),
        ({"q": torch.zeros(5, 2, 8)}, r"q must be \[B, T, heads, dim\]"),
        ({"q": torch.zeros(1, 5, 2, 8, dtype=torch.int64)}, "floating-point"),
        ({"q": torch.zeros(1, 5, 2, 8, dtype=torch.bfloat16)}, "share a dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    inputs = {n: x.float() for n, x in linear_inputs(T=5).items()}
    with pytest.raises(ShapeError, match=message):
        gated_delta_rule(**{**inputs, **change})


def test_implementations_that_do_not_exist_are_refused() -> None:
    inputs = linear_inputs(T=2)
    with pytest.raises(UnsupportedError, match="not built yet"):
        gated_delta_rule(**inputs, impl="triton")
    with pytest.raises(ConfigError, match="there are auto, chunked, reference"):
        gated_delta_rule(**inputs, impl="fastest")


def test_explain_says_what_runs_and_why() -> None:
    inputs = linear_inputs(T=2)
    choice = explain(gated_delta_rule, **inputs)
    assert choice.impl == "chunked"
    assert choice.rejected["reference"] == "only runs when named"
    assert "not built" in choice.rejected["triton"]
    assert "chunked" in str(choice)
    assert explain(gated_delta_rule, **inputs, impl="reference").impl == "reference"
