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
from torch.utils.flop_counter import FlopCounterMode

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import Gate, explain, gated_delta_rule, linear_attention, native
from support.budget import assert_within_budget
from support.linear_inputs import DECAYS, REGIMES, linear_inputs

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


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_equals_the_reference(impl: str, operator: str, decay: str, T: int) -> None:
    inputs = linear_inputs(B=2, T=T, H=2, HV=4, decay=decay)
    for got, expected in zip(
        runner(operator, impl)(**inputs), runner(operator, "reference")(**inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_keeps_the_error_budget_at_any_decay(
    impl: str, operator: str, dtype: torch.dtype, regime: Any, decay: str, trial: int
) -> None:
    inputs = linear_inputs(T=300, K=64, V=32, decay=decay, regime=regime, seed=trial)
    assert_within_budget(runner(operator, impl), runner(operator, "reference"), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_the_error_budget_over_a_thousand_tokens(impl: str, dtype: torch.dtype, trial: int) -> None:
    inputs = linear_inputs(T=1000, K=64, V=64, decay="channel", beta_max=2.0, seed=trial)
    assert_within_budget(runner("delta", impl), runner("delta", "reference"), inputs, dtype)


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


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    operator=st.sampled_from(sorted(OPERATORS)),
    decay=st.sampled_from(DECAYS),
    state=st.booleans(),
)
def test_packed_sequences_do_not_see_each_other(
    impl: str, lengths: list[int], operator: str, decay: str, state: bool
) -> None:
    check_packed(impl, lengths, operator, decay, state)


@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5), decay=st.sampled_from(DECAYS))
def test_packed_sequences_do_not_see_each_other_in_the_reference(lengths: list[int], decay: str) -> None:
    check_packed("reference", lengths, "delta", decay, True)


def check_packed(impl: str, lengths: list[int], operator: str, decay: str, state: bool) -> None:
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_keep_the_error_budget(impl: str, dtype: torch.dtype, regime: Any, trial: int) -> None:
    def gradients(which: str, **inputs: Tensor) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        outputs = gated_delta_rule(**leaves, output_final_state=True, impl=which)
        # Weights that any dtype holds exactly.
        weights = [torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(1)) for x in outputs]
        sum((w * x.double()).sum() for w, x in zip(weights, outputs, strict=True)).backward()
        return [x.grad for x in leaves.values()]

    inputs = linear_inputs(T=130, K=32, V=32, regime=regime, seed=trial)
    # Backward runs through the forward pass's four products and through two gradients of each.
    assert_within_budget(
        functools.partial(gradients, impl),
        functools.partial(gradients, "reference"),
        inputs,
        dtype,
        stages=12,
    )


def test_gradcheck(impl: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in linear_inputs(T=9, H=1, HV=2, K=3, V=2).items()}
    assert torch.autograd.gradcheck(
        lambda *a: gated_delta_rule(*a[:5], initial_state=a[5], output_final_state=True, impl=impl),
        tuple(inputs.values()),
    )


GATES = {
    "none": lambda A_log, dt_bias: None,
    "softplus": lambda A_log, dt_bias: Gate(A_log, dt_bias),
    "softplus without bias": lambda A_log, dt_bias: Gate(A_log),
    "bounded": lambda A_log, dt_bias: Gate(A_log, dt_bias, lower_bound=-5.0),
}


def raw_inputs(decay: str, T: int = 130, **shape: Any) -> dict[str, Tensor]:
    """Inputs as projections give them, and the parameters of the gates: 2 query heads, 4 value heads."""
    generator = torch.Generator().manual_seed(3 + shape.get("seed", 0))
    inputs = linear_inputs(T=T, H=2, HV=4, decay=decay, **shape)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    raw = {n: 3 * normal(*inputs[n].shape) for n in ("q", "k", "g", "beta")}
    channels = 4 * inputs["g"].shape[3] if decay == "channel" else 4
    return {**inputs, **raw, "A_log": 0.5 * normal(4), "dt_bias": normal(channels) - 2}


def run_raw(
    impl: str, gate: str, A_log: Tensor, dt_bias: Tensor, g: Tensor, **inputs: Tensor
) -> tuple[Tensor, Tensor]:
    made = GATES[gate](A_log, dt_bias)
    return gated_delta_rule(
        **inputs, g=g if made else -g.abs(), gate=made, normalize=True, beta_max=2.0, output_final_state=True,
        impl=impl,
    )  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_what_layers_leave_to_the_operator_equals_doing_it_before(impl: str, gate: str, decay: str) -> None:
    inputs = raw_inputs(decay)
    results, gradients = {}, {}
    for which in (impl, "reference"):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        results[which] = run_raw(which, gate, **leaves)
        sum(((1 + torch.arange(x.numel()) % 7).view(x.shape) * x).sum() for x in results[which]).backward()
        gradients[which] = {n: x.grad for n, x in leaves.items() if x.grad is not None}
    for got, expected in zip(results[impl], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert set(gradients[impl]) == set(gradients["reference"])
    for name, expected in gradients["reference"].items():
        torch.testing.assert_close(
            gradients[impl][name], expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_layers_leave_to_the_operator_keeps_the_error_budget(
    impl: str, gate: str, dtype: torch.dtype, trial: int
) -> None:
    assert_within_budget(
        functools.partial(run_raw, impl, gate),
        functools.partial(run_raw, "reference", gate),
        raw_inputs("channel", T=200, K=32, V=32, seed=trial),
        dtype,
        float32=frozenset({"A_log", "dt_bias", "initial_state"}),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": Gate(torch.zeros(3))}, "A_log must be"),
        ({"gate": Gate(torch.zeros(2), torch.zeros(5))}, "dt_bias must be"),
        ({"gate": Gate(torch.zeros(2), None, 1.0)}, "must be negative"),
        ({"gate": Gate(torch.zeros(2)), "g": None}, "needs a raw g"),
        ({"beta_max": 0.0}, "beta_max must be positive"),
    ],
)
def test_gates_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    inputs = {n: x.float() for n, x in linear_inputs(T=5).items()}
    with pytest.raises((ShapeError, ConfigError), match=message):
        gated_delta_rule(**{**inputs, **change})


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_works_under_torch_compile(impl: str, decay: str) -> None:
    inputs = {n: x.float() for n, x in linear_inputs(T=130, decay=decay).items()}
    run = functools.partial(gated_delta_rule, output_final_state=True, impl=impl)
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_strides_and_modes_do_not_matter(impl: str, mode: Any) -> None:
    inputs = linear_inputs(B=2, T=70)
    expected = runner("delta", impl)(**inputs)
    strange = {
        name: torch.stack([x, x], -1)[..., 0] if name in ("q", "beta") else x.mT.contiguous().mT
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strange.values())
    with mode():
        got = runner("delta", impl)(**strange)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_threads_change_no_bit(impl: str, packed: bool) -> None:
    inputs = linear_inputs(T=300, H=1, HV=3, K=16, V=16, sequences=3 if packed else None)
    edges = torch.tensor([0, 7, 200, 300]) if packed else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaves = {n: x.float().requires_grad_() for n, x in inputs.items()}
            outputs = runner("delta", impl, edges)(**leaves)
            sum(x.square().sum() for x in outputs).backward()
            results.append([*outputs, *(x.grad for x in leaves.values())])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(results[1], results[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("operator", ["gated_delta_rule", "linear_attention"])
@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("T", [5, 64, 130])
def test_what_is_not_remembered_is_not_computed_and_changes_no_bit(
    native_impl: str, T: int, decay: str, operator: str, dtype: torch.dtype
) -> None:
    # The kernels leave out products with a state that is zero, and the last state where nobody wants it.
    inputs = linear_inputs(T=T, H=2, HV=4, K=20, V=35, decay=decay)
    given = {name: x.to(dtype) for name, x in inputs.items() if name != "initial_state"}
    if operator == "linear_attention":
        del given["beta"]
    run = {"gated_delta_rule": gated_delta_rule, "linear_attention": linear_attention}[operator]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def results(**options: Any) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        o, state = run(**leaves, **options, impl="cpu")
        weights = torch.linspace(-1, 2, o.numel(), dtype=wide).view(o.shape)
        total = (o * weights).sum() + (0 if state is None else 0 * state.sum())
        return [o.detach(), *torch.autograd.grad(total, tuple(leaves.values()))]

    nothing = torch.zeros(1, 4, 20, 35, dtype=wide, requires_grad=True)
    whole = results(initial_state=nothing, output_final_state=True)
    for options in ({}, {"output_final_state": True}, {"initial_state": nothing}):
        for got, expected in zip(results(**options), whole, strict=True):
            assert torch.equal(got, expected)


def test_the_custom_operators_are_registered_as_torch_expects() -> None:
    if native.missing_reason():
        pytest.skip("the native kernels are not installed")
    x = {n: t.requires_grad_() for n, t in linear_inputs(T=70, H=1, HV=2, K=4, V=4).items()}
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"], None, None, x["initial_state"])
    settings = ([], 0.5, True, 0.0, 0.0, True, True)
    torch.library.opcheck(torch.ops.intarsia.linear_forward.default, (*arguments, *settings))


@pytest.mark.skipif(bool(native.missing_reason()), reason="no native kernels")
def test_flops_are_counted_where_the_kernels_run() -> None:
    T, HV, K, V, C = 128, 4, 8, 12, 64
    inputs = {n: x.float().requires_grad_() for n, x in linear_inputs(T=T, H=2, HV=HV, K=K, V=V).items()}
    beta = inputs.pop("beta")
    # What a token of a head costs: the state is read, erased from and written; scores of keys, queries and values.
    delta = 6 * K * V + C * (2 * K + V) + C * C
    additive = 4 * K * V + C * (K + V)
    for each, operator, erasing in (
        (delta, gated_delta_rule, {"beta": beta}),
        (additive, linear_attention, {}),
    ):
        with FlopCounterMode(display=False) as forward:
            o, _ = operator(**inputs, **erasing, impl="cpu")
        assert forward.get_total_flops() == T * HV * each
        with FlopCounterMode(display=False) as backward:
            o.sum().backward()
        assert backward.get_total_flops() == 2 * T * HV * each


def test_memory_grows_with_the_tokens_and_not_faster(impl: str) -> None:
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
        o, _ = gated_delta_rule(**inputs, impl=impl)
        o.sum().backward()
    assert largest.elements <= 2 * T * H * K


def test_state_and_output_dtypes(impl: str) -> None:
    for dtype, state in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for which in ("reference", impl):
            inputs = {n: x.to(dtype) for n, x in linear_inputs(T=3).items()}
            o, final = gated_delta_rule(**inputs, output_final_state=True, impl=which)
            assert o.dtype == dtype
            assert final.dtype == state
            assert gated_delta_rule(**inputs, impl=which)[1] is None


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
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "fewer than no tokens"),
        ({"q": torch.zeros(5, 2, 8)}, r"q must be \[B, T, heads, dim\]"),
        ({"q": torch.zeros(1, 5, 2, 8, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    inputs = {n: x.float() for n, x in linear_inputs(T=5).items()}
    with pytest.raises(ShapeError, match=message):
        gated_delta_rule(**{**inputs, **change})


@pytest.mark.cpu
def test_implementations_that_cannot_serve_are_refused() -> None:
    inputs = linear_inputs(T=2)
    with pytest.raises(UnsupportedError, match="no Triton kernels"):
        gated_delta_rule(**inputs, impl="triton")
    with pytest.raises(ConfigError, match="there are auto, cpu, fla, chunked, reference"):
        gated_delta_rule(**inputs, impl="fastest")
    if not native.missing_reason():
        small = {n: x.to(torch.float8_e5m2) for n, x in inputs.items()}
        with pytest.raises(UnsupportedError, match=r"q is torch\.float8_e5m2"):
            gated_delta_rule(**small, impl="cpu")


@pytest.mark.cpu
def test_explain_says_what_runs_and_why() -> None:
    inputs = linear_inputs(T=2)
    choice = explain(gated_delta_rule, **inputs)
    missing = native.missing_reason()
    assert choice.impl == ("chunked" if missing else "cpu")
    assert choice.rejected["reference"] == "only runs when named"
    assert "no Triton kernels" in choice.rejected["triton"]
    assert choice.rejected.get("cpu") == missing
    assert choice.impl in str(choice)
    elsewhere = {n: x.to("meta") for n, x in inputs.items()}
    assert explain(gated_delta_rule, **elsewhere).impl == "chunked"
    assert explain(gated_delta_rule, **inputs, impl="reference").impl == "reference"
