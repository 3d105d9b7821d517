"""The short convolution against PyTorch's own, and its states."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import Sequences, native, short_convolution
from support.budget import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
compiled = pytest.mark.skipif(native.missing_reason() is not None, reason="installed without the C++ kernels")
exact = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
tokens = st.one_of(st.integers(1, 12), st.integers(250, 270))
channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 512, 520]))


def inputs(
    *, B: int = 2, T: int, D: int, W: int = 4, sequences: int | None = None, state: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """x, weight and, if wanted, the initial state (of `sequences`, B by default), float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {"x": normal(B, T, D), "weight": normal(D, W)}
    return {**x, "initial_state": normal(sequences or B, W - 1, D)} if state else x


def run(impl: str, *, x: Tensor, weight: Tensor, initial_state: Tensor | None = None, **options: Any) -> Any:
    """The operator as a function of its tensors that returns output and final state."""
    return short_convolution(
        x, weight, initial_state=initial_state, output_final_state=True, impl=impl, **options
    )


def oracle(
    *, x: Tensor, weight: Tensor, initial_state: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's depthwise convolution."""
    W = weight.shape[1]
    row = F.pad(x.mT, (W - 1, 0)) if initial_state is None else torch.cat([initial_state.mT, x.mT], -1)
    y = F.conv1d(row, weight[:, None], groups=x.shape[2]).mT
    return F.silu(y) if activation else y, row[..., x.shape[1] :].mT


def gradients(compute: Any, x: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Of a weighted sum of both outputs."""
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    outputs = compute(**leaves, **options)
    # Weights that any dtype holds exactly.
    weights = [torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)) for y in outputs]
    sum((w * y.double()).sum() for w, y in zip(weights, outputs, strict=True)).backward()
    return {name: t.grad for name, t in leaves.items()}


def check(impl: str, x: dict[str, Tensor], activation: str | None) -> None:
    compute = functools.partial(run, impl)
    for got, expected in zip(
        compute(**x, activation=activation), oracle(**x, activation=activation), strict=True
    ):
        exact(got, expected)
    expected = gradients(oracle, x, activation=activation)
    for name, got in gradients(compute, x, activation=activation).items():
        exact(got, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@given(
    T=tokens,
    W=st.integers(1, 6),
    D=channels,
    state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    seed=st.integers(0, 1000),
)
def test_equals_a_depthwise_convolution(
    layer_impl: str, activation: str | None, T: int, W: int, D: int, **options: Any
) -> None:
    check(layer_impl, inputs(T=T, W=W, D=D, **options), activation)


@pytest.mark.parametrize(("T", "D", "W"), [(600, 1030, 4), (700, 3, 300), (3, 5, 300), (513, 16, 2)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_a_depthwise_convolution_where_the_work_is_divided(
    layer_impl: str, T: int, D: int, W: int, activation: str | None
) -> None:
    check(layer_impl, inputs(T=T, D=D, W=W), activation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("edges", [None, [0, 1, 4, 11]])
def test_gradcheck(layer_impl: str, activation: Any, edges: list[int] | None) -> None:
    x = inputs(B=1 if edges else 2, T=11, D=3, sequences=3 if edges else None)
    assert torch.autograd.gradcheck(
        lambda *a: run(
            layer_impl, x=a[0], weight=a[1], initial_state=a[2], activation=activation,
            cu_seqlens=None if edges is None else torch.tensor(edges),
        ),
        tuple(t.requires_grad_() for t in x.values()),
    )  # fmt: skip


@given(T=st.integers(2, 12), cut=st.integers(1, 11), W=st.integers(1, 5), state=st.booleans())
def test_can_be_split_anywhere(layer_impl: str, T: int, cut: int, W: int, state: bool) -> None:
    cut = min(cut, T - 1)
    x = inputs(T=T, D=3, W=W, state=state)
    y, final = run(layer_impl, **x)
    y_1, middle = run(layer_impl, **{**x, "x": x["x"][:, :cut]})
    y_2, last = run(layer_impl, x=x["x"][:, cut:], weight=x["weight"], initial_state=middle)
    exact(torch.cat([y_1, y_2], 1), y)
    exact(last, final)


@given(
    lengths=st.lists(st.one_of(st.integers(1, 8), st.integers(200, 300)), min_size=1, max_size=6),
    state=st.booleans(),
    W=st.integers(1, 5),
)
def test_packed_sequences_do_not_see_each_other(
    layer_impl: str, lengths: list[int], state: bool, W: int
) -> None:
    x = inputs(B=1, T=sum(lengths), D=3, W=W, sequences=len(lengths), state=state)
    compute = functools.partial(run, layer_impl, activation="silu")
    edges = torch.tensor([0, *lengths]).cumsum(0)

    def alone(x: Tensor, weight: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        each = [
            compute(x=x[:, a:b], weight=weight, initial_state=None if initial_state is None else state)
            for (a, b), state in zip(
                itertools.pairwise(edges),
                itertools.repeat(None) if initial_state is None else initial_state.split(1),
                strict=False,
            )
        ]
        return torch.cat([y for y, _ in each], 1), torch.cat([final for _, final in each])

    for got, expected in zip(compute(**x, cu_seqlens=edges), alone(**x), strict=True):
        exact(got, expected)
    expected = gradients(alone, x)
    for name, got in gradients(compute, x, cu_seqlens=edges).items():
        exact(got, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(cut=st.integers(1, 299), D=st.sampled_from([3, 32, 33]))
def test_the_future_changes_no_bit_of_the_past(layer_impl: str, dtype: torch.dtype, cut: int, D: int) -> None:
    x = {name: t.to(dtype) for name, t in inputs(B=1, T=300, D=D).items()}
    changed = x["x"].clone()
    changed[:, cut:] = torch.nan
    compute = functools.partial(run, layer_impl, activation="silu")
    assert torch.equal(compute(**x)[0][:, :cut], compute(**{**x, "x": changed})[0][:, :cut])


def test_what_is_not_a_number_stays_in_its_sequence(layer_impl: str) -> None:
    x = inputs(B=1, T=10, D=3, state=False)
    x["x"][:, :5] = torch.nan
    edges = torch.tensor([0, 5, 10])
    leaf = x["x"].requires_grad_()
    y, final = run(layer_impl, **x, activation="silu", cu_seqlens=edges)
    assert torch.isfinite(y[:, 5:]).all()
    assert torch.isfinite(final[1]).all()
    y[:, 5:].sum().backward()
    assert torch.isfinite(leaf.grad[:, 5:]).all()


# PyTorch's form rounds to the inputs' dtype after each product and after the activation.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_keeps_the_error_budget(
    layer_impl: str, dtype: torch.dtype, activation: str | None, trial: int
) -> None:
    inside = layer_impl == "torch"
    assert_within_budget(
        functools.partial(run, layer_impl, activation=activation),
        functools.partial(oracle, activation=activation),
        inputs(T=300, D=64, seed=trial),
        dtype,
        stages=5,
        inside=inside,
    )


# Backward as many again for each of the two gradients.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_keep_the_error_budget(
    layer_impl: str, dtype: torch.dtype, activation: str | None, trial: int
) -> None:
    def of(compute: Any, **x: Tensor) -> list[Tensor]:
        return list(gradients(compute, x, activation=activation).values())

    assert_within_budget(
        functools.partial(of, functools.partial(run, layer_impl)),
        functools.partial(of, oracle),
        inputs(T=300, D=64, seed=trial),
        dtype,
        stages=15,
        terms=600,  # the weight's gradient sums over the tokens of both rows
        inside=layer_impl == "torch",
    )


def test_any_number_has_its_silu(layer_impl: str) -> None:
    numbers = [0.0, 1e-30, 1.0, 16.0, 87.0, 87.9, 88.1, 88.5, 89.5, 104.0, 1000.0, 1e30, 3e38]
    x = torch.tensor([*numbers, *(-n for n in numbers)])[None, None].requires_grad_()
    y, _ = short_convolution(x, torch.ones(x.shape[2], 1), activation="silu", impl=layer_impl)
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    F.silu(wide).sum().backward()
    torch.testing.assert_close(y, F.silu(wide.float()), rtol=1e-6, atol=1e-35)
    torch.testing.assert_close(x.grad, wide.grad.float(), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("packed", [False, True])
def test_works_under_torch_compile(layer_impl: str, packed: bool) -> None:
    x = inputs(B=1, T=20, D=8, sequences=2 if packed else None)
    seqs = Sequences((7, 13)) if packed else None
    compute = functools.partial(run, layer_impl, activation="silu", cu_seqlens=seqs)
    torch.compiler.reset()  # which allows a few versions of one function
    # aot_eager traces forward and backward as inductor does, without compiling C++ for each shape.
    traced = torch.compile(compute, backend="aot_eager", fullgraph=True)
    for got, expected in zip(traced(**x), compute(**x), strict=True):
        exact(got, expected)
    expected = gradients(compute, x)
    for name, got in gradients(traced, x).items():
        exact(got, expected[name])


STRANGE = {
    "every other channel": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "some columns of a wider tensor": lambda t: F.pad(t, (3, 2))[..., 3:-2],
    "some rows of a longer tensor": lambda t: F.pad(t, (0, 0, 1, 2))[..., 1:-2, :],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", STRANGE)
def test_strides_and_modes_do_not_matter(layer_impl: str, mode: Any, how: str) -> None:
    x = inputs(T=30, D=6)
    strange = {name: STRANGE[how](t) for name, t in x.items()}
    assert not strange["x"].is_contiguous()
    with mode():
        got = run(layer_impl, **strange)
    for a, b in zip(got, run(layer_impl, **x), strict=True):
        exact(a, b)
    got, expected = (gradients(functools.partial(run, layer_impl), t) for t in (strange, x))
    for name in x:
        exact(got[name], expected[name])


def test_expanded_inputs_and_gradients(layer_impl: str) -> None:
    x = inputs(B=1, T=30, D=6, state=False)
    batch = x["x"].expand(3, -1, -1).requires_grad_()
    y, _ = run(layer_impl, x=batch, weight=x["weight"])
    y.sum().backward()  # whose gradient has no strides
    exact(y[2:], run(layer_impl, **x)[0])


@pytest.mark.parametrize("edges", [None, [0, 7, 200, 900]])
def test_threads_change_no_bit(layer_impl: str, edges: list[int] | None) -> None:
    x = {n: t.float() for n, t in inputs(B=1, T=900, D=600, sequences=3 if edges else None).items()}
    cu_seqlens = None if edges is None else torch.tensor(edges)
    compute = functools.partial(run, layer_impl, activation="silu", cu_seqlens=cu_seqlens)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*compute(**x), *gradients(compute, x).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # PyTorch's own sums may take their order from the number of threads.
            torch.testing.assert_close(a, b)
            assert layer_impl == "torch" or torch.equal(a, b)


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(layer_impl: str, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = inputs(T=6, D=16)
    leaves = {"x": x["x"].to(x_dtype), "weight": x["weight"].to(weight_dtype)}
    y, final = run(layer_impl, **leaves)
    assert y.dtype == x_dtype
    assert final.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
    assert short_convolution(*leaves.values(), impl=layer_impl)[1] is None
    torch.testing.assert_close(
        y.double(), oracle(**{n: t.double() for n, t in leaves.items()})[0], rtol=2e-2, atol=2e-2
    )
    for name, gradient in gradients(functools.partial(run, layer_impl), leaves).items():
        assert gradient.dtype == leaves[name].dtype


@compiled
def test_the_custom_operators_are_registered_as_torch_expects() -> None:
    x = tuple(inputs(T=9, D=4).values())
    operators = torch.ops.intarsia
    leaves = tuple(t.clone().requires_grad_() for t in x)
    torch.library.opcheck(operators.conv_forward.default, (*leaves, [], True, True))
    y, final = operators.conv_forward(*x, [], True, True)
    torch.library.opcheck(operators.conv_backward.default, (*x, [], True, y, final))


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(1, 4, 3), torch.zeros(3, 4)
    with pytest.raises(ShapeError, match=r"weight \[D, W\]"):
        short_convolution(x, weight.mT)
    with pytest.raises(ShapeError, match="initial_state must be"):
        short_convolution(x, weight, initial_state=torch.zeros(1, 4, 3))
    with pytest.raises(ShapeError, match="describes one row of 3"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match="activation"):
        short_convolution(x, weight, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are auto, cpu, torch"):
        short_convolution(x, weight, impl="fastest")


def test_what_the_kernels_cannot_serve_falls_back_or_is_refused() -> None:
    weight = torch.randn(3, 4)
    half = torch.randn(1, 4, 3).half()
    assert short_convolution(half, weight)[0].dtype == torch.float16
    assert short_convolution(torch.zeros(1, 0, 3), weight)[0].shape == (1, 0, 3)
    assert short_convolution(torch.zeros(1, 4, 3, device="meta"), weight.to("meta"))[0].is_meta
    if native.missing_reason():
        return
    with pytest.raises(UnsupportedError, match=r"x is torch\.float16"):
        short_convolution(half, weight, impl="cpu")
    with pytest.raises(UnsupportedError, match="nothing to compute"):
        short_convolution(torch.zeros(1, 0, 3), weight, impl="cpu")
    with pytest.raises(UnsupportedError, match="on meta"):
        short_convolution(torch.zeros(1, 4, 3, device="meta"), weight.to("meta"), impl="cpu")
