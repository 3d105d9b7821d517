"""The general rule, diagonal plus low rank: against the float64 reference, and the other rules as special cases."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import dplr_rule, explain, gated_delta_rule, linear_attention
from support.budget import assert_within_budget
from support.linear_inputs import DECAYS, REGIMES, linear_inputs

DTYPES = [torch.float32, torch.bfloat16]
FLOAT32 = frozenset({"g", "initial_state"})
STAGES = 5
"""Dependent products: scores, what is read of the values, inverse, erased values, outputs."""


def dplr_inputs(*, shared: bool = False, **shape: Any) -> dict[str, Tensor | None]:
    """The inputs of `linear_inputs` with `a = beta (rate ⊙ b)`, `rate` in [0.3, 1] of each channel and `|b| = 1`.

    No such transition makes `rate^-1/2 ⊙ S` longer, whatever the decay. With `shared` b is of query heads.
    """
    inputs = linear_inputs(**shape)
    beta = inputs.pop("beta")
    heads, K = inputs["q" if shared else "v"].shape[2], inputs["k"].shape[3]
    B, T, HV = beta.shape
    generator = torch.Generator().manual_seed(100 + shape.get("seed", 0))
    b = torch.randn(B, T, heads, K, generator=generator, dtype=torch.float64)
    b = torch.nn.functional.normalize(b, dim=-1)
    rate = 0.3 + 0.7 * torch.rand(HV, K, generator=generator, dtype=torch.float64)
    a = beta[..., None] * rate * b.repeat_interleave(HV // heads, dim=2)
    return {**inputs, "a": a, "b": b}


def run(impl: str, cu_seqlens: Tensor | None = None, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    o, state = dplr_rule(**inputs, output_final_state=True, cu_seqlens=cu_seqlens, impl=impl)
    assert state is not None
    return o, state


def close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_equals_the_reference(decay: str, shared: bool, T: int) -> None:
    inputs = dplr_inputs(B=2, T=T, H=2, HV=4, decay=decay, shared=shared)
    close(run("chunked", **inputs), run("reference", **inputs))


@given(
    T=st.integers(1, 150),
    B=st.integers(1, 3),
    H=st.integers(1, 2),
    group=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    decay=st.sampled_from(DECAYS),
    regime=st.sampled_from(REGIMES),
    state=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_whatever_the_shape(H: int, group: int, **shape: Any) -> None:
    inputs = dplr_inputs(H=H, HV=H * group, **shape)
    close(run("chunked", **inputs), run("reference", **inputs), 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [3, 130])
def test_the_reference_is_the_recurrence_of_the_docstring(decay: str, T: int) -> None:
    inputs = dplr_inputs(T=T, H=1, HV=1, decay=decay)
    q, k, v, a, b = (inputs[name][0, :, 0] for name in "qkvab")
    S = inputs["initial_state"][0, 0]
    outputs = []
    for t in range(T):
        g = {"none": lambda t: torch.zeros(8), "fixed": lambda t: inputs["g"].expand(8)}.get(
            decay, lambda t: inputs["g"][0, t, 0].expand(8)
        )(t)
        S = (torch.diag(g.exp()) - torch.outer(a[t], b[t])) @ S + torch.outer(k[t], v[t])
        outputs.append(S.mT @ q[t] * 8**-0.5)
    o, state = run("reference", **inputs)
    torch.testing.assert_close(o[0, :, 0], torch.stack(outputs))
    torch.testing.assert_close(state[0, 0], S)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("regime", ["kda", "strong", "resets"])
def test_the_delta_rule_is_a_special_case(impl: str, decay: str, regime: Any) -> None:
    """`(I - beta k kᵀ) Diag(alpha) = Diag(alpha) - (beta k) (alpha ⊙ k)ᵀ`."""
    x = linear_inputs(B=2, T=130, H=2, HV=4, decay=decay, regime=regime, beta_max=2.0)
    expected = gated_delta_rule(**x, output_final_state=True, impl=impl)
    beta = x.pop("beta")[..., None]
    k = x["k"].repeat_interleave(2, dim=2)
    alpha = {
        "none": lambda: torch.ones(()),
        "fixed": lambda: x["g"].exp()[:, None],
        "head": lambda: x["g"].exp()[..., None],
        "channel": lambda: x["g"].exp(),
    }[decay]()
    # The write strength goes with the values: keys are shared by the value heads.
    got = run(impl, **{**x, "v": beta * x["v"], "a": beta * k, "b": alpha * k})
    close(got, expected)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_additive_rule_is_a_special_case(decay: str) -> None:
    x = linear_inputs(T=130, decay=decay)
    del x["beta"]
    nothing = torch.zeros_like(x["k"])
    close(run("chunked", **x, a=nothing, b=x["k"]), linear_attention(**x, output_final_state=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_keeps_the_error_budget_at_any_decay(dtype: torch.dtype, regime: Any, decay: str, trial: int) -> None:
    inputs = dplr_inputs(T=300, K=64, V=32, decay=decay, regime=regime, seed=trial)
    chunked, exact = (functools.partial(run, impl) for impl in ("chunked", "reference"))
    assert_within_budget(chunked, exact, inputs, dtype, float32=FLOAT32, stages=STAGES)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    decay=st.sampled_from(DECAYS),
    state=st.booleans(),
)
def test_packed_sequences_do_not_see_each_other(
    impl: str, lengths: list[int], decay: str, state: bool
) -> None:
    inputs = dplr_inputs(T=sum(lengths), decay=decay, sequences=len(lengths), state=state)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    o, final = run(impl, edges, **inputs)
    fixed = ("initial_state", "g") if decay == "fixed" else ("initial_state",)
    for n, (start, stop) in enumerate(itertools.pairwise(edges)):
        alone = {name: x if x is None or name in fixed else x[:, start:stop] for name, x in inputs.items()}
        if state:
            alone["initial_state"] = inputs["initial_state"][n : n + 1]
        close((o[:, start:stop], final[n : n + 1]), run(impl, **alone))


@given(T=st.integers(2, 200), cut=st.integers(1, 199))
def test_a_sequence_can_be_split_anywhere(T: int, cut: int) -> None:
    cut = min(cut, T - 1)
    inputs = dplr_inputs(T=T)
    o_1, middle = run("chunked", **{n: x if n == "initial_state" else x[:, :cut] for n, x in inputs.items()})
    second = {n: middle if n == "initial_state" else x[:, cut:] for n, x in inputs.items()}
    o_2, final = run("chunked", **second)
    close((torch.cat([o_1, o_2], dim=1), final), run("chunked", **inputs))


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(cut=st.integers(1, 199), regime=st.sampled_from(REGIMES), seed=st.integers(0, 99))
def test_the_future_changes_no_bit_of_the_past(
    decay: str, dtype: torch.dtype, cut: int, regime: Any, seed: int
) -> None:
    inputs = dplr_inputs(T=200, K=16, V=8, decay=decay, regime=regime, seed=seed)
    other = dplr_inputs(T=200, K=16, V=8, decay=decay, regime="strong", seed=seed + 1)

    past = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    changed = {
        name: x
        if x is None or name == "initial_state"
        else torch.cat([x[:, :cut], 3 * other[name].to(dtype)[:, cut:]], 1)
        for name, x in past.items()
    }
    assert torch.equal(run("chunked", **past)[0][:, :cut], run("chunked", **changed)[0][:, :cut])


def gradients(impl: str, edges: Tensor | None = None, **inputs: Tensor | None) -> dict[str, Tensor]:
    """Of the outputs weighted with numbers that any dtype holds exactly."""
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    outputs = run(impl, edges, **leaves)
    weights = [torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(1)) for x in outputs]
    sum((w * x.double()).sum() for w, x in zip(weights, outputs, strict=True)).backward()
    return {n: x.grad for n, x in leaves.items() if x is not None}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("regime", ["kda", "minus five", "resets", "all lost"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_the_reference(decay: str, regime: Any, packed: bool) -> None:
    lengths = [3, 66, 1, 64] if packed else None
    inputs = dplr_inputs(
        T=134, H=1, HV=2, decay=decay, regime=regime, sequences=4 if packed else None, shared=packed
    )
    edges = torch.tensor([0, *lengths]).cumsum(0) if lengths else None
    expected = gradients("reference", edges, **inputs)
    for name, gradient in gradients("chunked", edges, **inputs).items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_keep_the_error_budget(dtype: torch.dtype, regime: Any, trial: int) -> None:
    chunked, exact = (
        lambda impl=impl, **x: list(gradients(impl, **x).values()) for impl in ("chunked", "reference")
    )
    inputs = dplr_inputs(T=130, K=32, V=32, regime=regime, seed=trial)
    # Backward runs through the forward pass's products and through two gradients of each.
    assert_within_budget(chunked, exact, inputs, dtype, float32=FLOAT32, stages=3 * STAGES)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(decay: str) -> None:
    inputs = dplr_inputs(T=9, H=1, HV=2, K=3, V=2, decay=decay, shared=True)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}
    assert torch.autograd.gradcheck(
        lambda *values: run("chunked", **dict(zip(leaves, values, strict=True))), tuple(leaves.values())
    )


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_works_under_torch_compile(decay: str) -> None:
    inputs = {n: x.float() for n, x in dplr_inputs(T=130, decay=decay).items() if x is not None}
    # aot_eager traces forward and backward as inductor does, without compiling C++ for each shape.
    compiled = torch.compile(dplr_rule, backend="aot_eager", fullgraph=True)
    leaves = [{n: x.clone().requires_grad_() for n, x in inputs.items()} for _ in range(2)]
    results = [f(**x, output_final_state=True) for f, x in zip((dplr_rule, compiled), leaves, strict=True)]
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    for o, state in results:
        (o.sum() + state.sum()).backward()
    for name in inputs:
        torch.testing.assert_close(leaves[1][name].grad, leaves[0][name].grad)


@pytest.mark.parametrize("same", [("q", "k"), ("a", "b"), ("k", "b"), ("k", "a", "b")], ids=" ".join)
def test_one_tensor_may_serve_twice(same: tuple[str, ...]) -> None:
    """What is changed in place inside must be no input, and torch.compile must see each tensor once."""
    inputs = {n: x.float() for n, x in dplr_inputs(T=70).items()}
    shared = 0.5 * inputs["b"]
    expected = dplr_rule(**{**inputs, **{name: shared.clone() for name in same}})[0]
    before = shared.clone()
    twice = {**inputs, **dict.fromkeys(same, shared)}
    compiled = torch.compile(dplr_rule, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(dplr_rule(**twice)[0], expected)
    torch.testing.assert_close(compiled(**twice)[0], expected)
    assert torch.equal(shared, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_strides_and_modes_do_not_matter(mode: Any) -> None:
    inputs = dplr_inputs(B=2, T=70)
    expected = run("chunked", **inputs)
    strange = {
        name: torch.stack([x, x], -1)[..., 0] if name in ("q", "a") else x.mT.contiguous().mT
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strange.values())
    with mode():
        got = run("chunked", **strange)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


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
    inputs = {n: x.float().requires_grad_() for n, x in dplr_inputs(T=T, H=H, HV=H, K=K, V=K).items()}
    with Largest() as largest:
        o, _ = dplr_rule(**inputs, impl="chunked")
        o.sum().backward()
    assert largest.elements <= 2 * T * H * K


def test_state_and_output_dtypes() -> None:
    for dtype, state in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        inputs = {n: x.to(dtype) for n, x in dplr_inputs(T=3).items()}
        # a and b may be wider than q, k and v.
        inputs["a"], inputs["b"] = (inputs[n].to(state) for n in "ab")
        for impl in ("reference", "chunked"):
            o, final = run(impl, **inputs)
            assert o.dtype == dtype
            assert final.dtype == state
            assert dplr_rule(**inputs, impl=impl)[1] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(1, 5, 3, 8)}, r"a must be \[B, T, HV, K\] = \[1, 5, 2, 8\] or"),
        ({"b": torch.zeros(1, 5, 2)}, "b must be"),
        ({"b": torch.zeros(1, 5, 2, 8, dtype=torch.int64)}, "b must be a floating-point tensor"),
        ({"k": torch.zeros(1, 5, 2, 9)}, "k must have the shape of q"),
        ({"g": torch.zeros(1, 5, 2, 7)}, "g must be None or of shape"),
        ({"initial_state": torch.zeros(1, 2, 12, 8)}, "transpose it"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens describes one row of 4"),
        ({"a": torch.zeros(1, 5, 2, 8, device="meta")}, "a is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    inputs = {n: x.float() for n, x in dplr_inputs(T=5).items()}
    with pytest.raises(ShapeError, match=message):
        dplr_rule(**{**inputs, **change})


@pytest.mark.parametrize("decay", DECAYS)
@settings(max_examples=12)
@given(
    T=st.integers(1, 32),
    K=st.integers(1, 20),
    V=st.integers(1, 40),
    group=st.integers(1, 3),
    shared=st.booleans(),
)
def test_few_tokens_behind_a_state_equal_the_reference(
    native_impl: str, decay: str, T: int, K: int, V: int, group: int, shared: bool
) -> None:
    """On every instruction set, in odd shapes; and a token at a time, to the bit."""
    inputs = dplr_inputs(T=T, HV=2 * group, K=K, V=V, decay=decay, shared=shared)
    got = run(native_impl, **inputs)
    close(got, run("reference", **inputs))
    state, outputs = inputs.pop("initial_state"), []
    for t in range(T):
        part = {n: x if x is None or x.dim() == 1 else x[:, t : t + 1] for n, x in inputs.items()}
        o, state = run(native_impl, **part, initial_state=state)
        outputs.append(o)
    assert torch.equal(torch.cat(outputs, dim=1), got[0])
    assert torch.equal(state, got[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_few_tokens_keep_the_error_budget(
    native_impl: str, dtype: torch.dtype, regime: Any, trial: int
) -> None:
    inputs = dplr_inputs(T=30, K=64, V=32, decay="channel", regime=regime, seed=trial)
    few, exact = (functools.partial(run, impl) for impl in (native_impl, "reference"))
    assert_within_budget(few, exact, inputs, dtype, float32=FLOAT32, stages=STAGES)


def test_of_packed_sequences_those_with_few_tokens_take_the_step(native_impl: str) -> None:
    lengths = (3, 0, 70, 1)
    edges = torch.tensor([0, 3, 3, 73, 74])
    inputs = dplr_inputs(B=1, T=sum(lengths), decay="channel", shared=True)
    inputs["initial_state"] = torch.randn(4, *inputs["initial_state"].shape[1:], dtype=torch.float64)
    got = run(native_impl, edges, **inputs)
    close(got, run("reference", edges, **inputs))
    assert torch.equal(got[1][1], inputs["initial_state"][1])


def test_native_kernels_are_refused_and_explained() -> None:
    inputs = dplr_inputs(T=2)
    with pytest.raises(UnsupportedError, match="always give the final state"):
        dplr_rule(**inputs, impl="cpu")
    with pytest.raises(UnsupportedError, match="no Triton kernels"):
        dplr_rule(**inputs, impl="triton")
    with pytest.raises(ConfigError, match="there are auto, cpu, fla, chunked, reference"):
        dplr_rule(**inputs, impl="fastest")
    choice = explain(dplr_rule, **inputs)
    assert choice.impl == "chunked"
    assert choice.rejected["cpu"] == "the kernels always give the final state, which was not asked for"
    assert explain(dplr_rule, **inputs, impl="reference").impl == "reference"
    positional = [inputs[name] for name in ("q", "k", "v", "a", "b", "g")]
    assert explain(dplr_rule, *positional).impl == "chunked"
