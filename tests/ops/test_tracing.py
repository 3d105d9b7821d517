"""Whatever in PyTorch follows the operators sees what they compute: transforms, tracers, tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from intarsia.errors import UnsupportedError
from intarsia.ops import (
    DecodeStep,
    Gate,
    Sequences,
    Slots,
    dplr_rule,
    explain,
    gated_delta_rule,
    gated_rms_norm,
    linear_attention,
    native,
    short_convolution,
)
from intarsia.ops.decode_call import FEW

Results = tuple[Tensor, ...]
Function = Callable[..., Results]
Tensors = tuple[Tensor, ...]

needs_kernels = pytest.mark.skipif(native.missing_reason() is not None, reason="no native kernels")


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Results:
    return gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)


def delta_of_layers(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, A_log: Tensor, dt_bias: Tensor
) -> Results:
    return gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, normalize=True, beta_max=2.0,
        gate=Gate(A_log, dt_bias),
    )  # fmt: skip


def additive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Results:
    return linear_attention(q, k, v, g[..., 0], initial_state=state, output_final_state=True)


def packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Results:
    T = int(q.shape[1])
    seqs = Sequences((0, T // 3, T - T // 3))
    return gated_delta_rule(q[:1], k[:1], v[:1], g[:1], beta[:1], output_final_state=True, cu_seqlens=seqs)


def general(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Results:
    return dplr_rule(q, k, v, beta[..., None] * k, k, g, initial_state=state, output_final_state=True)


def convolution(x: Tensor, weight: Tensor, conv_state: Tensor) -> Results:
    return short_convolution(x, weight, activation="silu", initial_state=conv_state, output_final_state=True)


def norm(o: Tensor, z: Tensor, weight_of_norm: Tensor) -> Results:
    return (gated_rms_norm(o, z, weight_of_norm, eps=1e-5, gate="swish"),)


FUNCTIONS: list[Function] = [delta, delta_of_layers, additive, packed, general, convolution, norm]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
every_length = pytest.mark.parametrize("T", [3, FEW + 1])


def inputs(function: Function, T: int, seed: int = 0, B: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    H, K, V = 2, 3, 2
    known = {
        "q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, V),
        "g": -normal(B, T, H, K).square(), "beta": torch.sigmoid(normal(B, T, H)), "state": normal(B, H, K, V),
        "A_log": normal(H), "dt_bias": normal(H * K), "x": normal(B, T, 3), "weight": normal(3, 4),
        "conv_state": normal(B, 3, 3), "o": normal(B, T, H, V), "z": normal(B, T, H, V),
        "weight_of_norm": normal(V),
    }  # fmt: skip
    return tuple(known[name] for name in function.__annotations__ if name != "return")


def loss(function: Function, *x: Tensor) -> Tensor:
    """A number that depends on every output in a way of its own."""
    total = x[0].new_zeros(())
    for out in function(*x):
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        total = total + (out * weights).sum()
    return total


def gradients(function: Function, *x: Tensor) -> Tensors:
    leaves = [t.clone().requires_grad_() for t in x]
    return torch.autograd.grad(loss(function, *leaves), leaves)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-9, atol=1e-9)


@every_function
@every_length
def test_grad(function: Function, T: int) -> None:
    x = inputs(function, T)
    argnums = tuple(range(len(x)))
    close(torch.func.grad(lambda *y: loss(function, *y), argnums)(*x), gradients(function, *x))


@every_function
@every_length
def test_what_goes_past_the_dispatcher_is_what_goes_through_it(function: Function, T: int) -> None:
    x = tuple(t.requires_grad_() for t in inputs(function, T))
    with FlopCounterMode(display=False):  # which sees all calls
        seen = [*function(*x), *gradients(function, *x)]
    unseen = [*function(*x), *gradients(function, *x)]
    assert all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))


@every_function
@every_length
def test_jvp_and_forward_mode(function: Function, T: int) -> None:
    x, tangents = inputs(function, T), inputs(function, T, seed=1)
    expected = sum((d * t).sum() for d, t in zip(gradients(function, *x), tangents, strict=True))
    _, got = torch.func.jvp(lambda *y: loss(function, *y), x, tangents)
    close([got], [expected])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(x, tangents, strict=True)]
        got = forward_ad.unpack_dual(loss(function, *duals)).tangent
    close([got], [expected])


@every_function
@every_length
def test_vmap(function: Function, T: int) -> None:
    rows = [inputs(function, T, seed) for seed in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    each = [torch.stack(parts) for parts in zip(*(function(*x) for x in rows), strict=True)]
    close(torch.vmap(function)(*stacked), each)
    # With one argument for all, too, and gradients of each.
    in_dims = (0, *[None] * (len(stacked) - 1))
    got = torch.vmap(torch.func.grad(lambda *y: loss(function, *y)), in_dims)(stacked[0], *rows[0][1:])
    close(got, [gradients(function, stacked[0][n], *rows[0][1:])[0] for n in range(3)])


@every_function
@pytest.mark.parametrize("T", [3, 9])
def test_second_derivatives(function: Function, T: int) -> None:
    x = tuple(t.requires_grad_() for t in inputs(function, T, B=1))
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize(
    "function", [delta, delta_of_layers, additive, convolution, norm], ids=lambda f: f.__name__
)
def test_first_derivatives_are_the_same_where_second_ones_follow(function: Function) -> None:
    x = [t.requires_grad_() for t in inputs(function, 70)]
    once = torch.autograd.grad(loss(function, *x), x)
    again = torch.autograd.grad(loss(function, *x), x, create_graph=True)
    close(again, once)
    assert all(d.requires_grad for d in again)


@every_function
@every_length
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(function: Function, T: int) -> None:
    traced = torch.jit.trace(function, inputs(function, T), check_trace=False)
    other = inputs(function, T, seed=1)
    close(traced(*other), function(*other))


@every_function
@pytest.mark.parametrize("strict", [False, True])
def test_export(function: Function, strict: bool) -> None:
    class Layer(nn.Module):
        def forward(self, *x: Tensor) -> Results:
            return function(*x)

    with torch.no_grad():
        exported = torch.export.export(Layer(), inputs(function, 5), strict=strict)
    other = inputs(function, 5, seed=1)
    close(exported.module()(*other), function(*other))


@every_function
@every_length
def test_tensors_without_memory(function: Function, T: int) -> None:
    x = inputs(function, T)
    shapes = [(out.shape, out.dtype) for out in function(*x)]
    assert [(out.shape, out.dtype) for out in function(*(t.to("meta") for t in x))] == shapes
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in x]
    assert [(out.shape, out.dtype) for out in function(*fakes)] == shapes
    with mode:
        assert [(out.shape, out.dtype) for out in function(*fakes)] == shapes
    close(torch.func.functionalize(function)(*x), function(*x))


class Tagged(Tensor):
    """A type derived from Tensor."""


@every_function
@every_length
def test_types_derived_from_tensor(function: Function, T: int) -> None:
    x = inputs(function, T)
    got = function(*(t.as_subclass(Tagged) for t in x))
    assert all(type(out) is Tagged for out in got)
    close([out.as_subclass(Tensor) for out in got], function(*x))


def test_compiled_transforms() -> None:
    torch._dynamo.reset()
    for function in (delta, norm):
        x = inputs(function, 3)
        compiled = torch.compile(
            lambda *y, function=function: torch.func.grad(lambda *z: loss(function, *z))(*y),
            backend="aot_eager",
            fullgraph=True,
        )
        close([compiled(*x)], gradients(function, *x)[:1])


@needs_kernels
def test_the_kernels_are_refused_by_name_under_a_transform() -> None:
    x = inputs(delta, 3)

    def choose(*y: Tensor) -> Tensor:
        choice = explain(gated_delta_rule, *y[:5])
        assert choice.impl == "chunked"
        assert "torch.func" in choice.rejected["cpu"]
        return gated_delta_rule(*y[:5], impl="cpu")[0].sum()

    with pytest.raises(UnsupportedError, match=r"transform of torch\.func"):
        torch.func.grad(choose)(*x)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        gated_delta_rule(*x[:5], impl="cpu")


def step(**options: Any) -> DecodeStep:
    return DecodeStep(heads=2, key_dim=3, value_heads=2, value_dim=2, **options)


def test_the_decode_step_takes_nothing_for_memory_that_is_none() -> None:
    """What the kernels cannot read, PyTorch computes, or refuses."""
    generator = torch.Generator().manual_seed(0)
    rows, beta = torch.randn(4, 16, generator=generator), torch.randn(4, 2, generator=generator)
    slots = Slots([0, 1], lengths=[1, 3])
    mode = FakeTensorMode()
    with mode:
        pool = step().new_pool(2)
        o = step()(mode.from_tensor(rows), pool, slots, beta=mode.from_tensor(beta))
        assert o.shape == (4, 4)
        weights = torch.randn(16, 4)
        with_weights = step(conv_weight=weights, activation="silu")  # copies them, were they numbers
        assert with_weights(mode.from_tensor(rows), with_weights.new_pool(2), slots).shape == (4, 4)
        if native.missing_reason() is None:
            with pytest.raises(UnsupportedError, match="plain weights"):
                step(conv_weight=weights, impl="cpu")
    # Fake rows, real states, no mode around them.
    with pytest.raises(Exception, match=r"[Ff]ake"):
        step()(mode.from_tensor(rows), step().new_pool(2), slots)
    real, tagged = step().new_pool(2), step().new_pool(2)
    expected = step(impl="torch")(rows, real, slots, beta=beta)
    got = step()(rows.as_subclass(Tagged), tagged, slots, beta=beta)
    torch.testing.assert_close(got.as_subclass(Tensor), expected)
    torch.testing.assert_close(tagged.board, real.board)


@needs_kernels
def test_the_kernels_themselves_refuse_what_has_no_memory() -> None:
    with FakeTensorMode():
        fake = torch.empty(1, 3, 2)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        native.native().conv_forward(
            fake, torch.zeros(2, 4), None, [], False, torch.zeros(1, 3, 2), None, native.instruction_set(), 1
        )


@every_function
@every_length
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_activation_checkpointing(function: Function, T: int, again: bool) -> None:
    x = inputs(function, T)

    def recomputed(*leaves: Tensor) -> Results:
        results: Results = checkpoint(function, *leaves, use_reentrant=False)
        return results

    def differentiated(of: Function) -> Tensors:
        leaves = [t.clone().requires_grad_() for t in x]
        grads = torch.autograd.grad(loss(of, *leaves), leaves, create_graph=again)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) if again else grads  # type: ignore[arg-type]

    close(differentiated(recomputed), differentiated(function))
