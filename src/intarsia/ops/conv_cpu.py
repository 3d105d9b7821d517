"""The native short convolution as `torch.library` custom operators; the kernels are in `csrc/conv*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.conv_call import ConvCall
from intarsia.ops.conv_torch import conv_in_torch
from intarsia.ops.native_operator import (
    DTYPES,
    Optional,
    detached,
    edges_of,
    implementation,
    refuse,
    rows,
)
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import apart_from_torch, differentiable_gradients, differentiable_once


def refuse_conv(call: ConvCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    x, weight = call.x, call.weight
    for tensor in (weight, call.initial_state):
        if tensor is not None and tensor.device != x.device:
            return f"x is on {x.device} and another argument on {tensor.device}"
    if x.numel() == 0 or weight.shape[1] == 0:
        return f"there is nothing to compute; x is {list(x.shape)} and weight {list(weight.shape)}"
    return refuse("x", x)


def cpu_conv(call: ConvCall) -> tuple[Tensor, Tensor | None]:
    """Run the convolution natively."""
    x, weight, silu, initial_state, output_final_state, seqs = call
    dtype = compute_dtype(x)
    forward = (
        _forward if apart_from_torch(x, weight, initial_state) else torch.ops.intarsia.conv_forward.default
    )
    y, final = forward(
        rows(x),
        (weight if weight.dtype in DTYPES else weight.to(dtype)).contiguous(),
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        [] if seqs is None else list(seqs.lengths),
        silu,
        output_final_state,
    )
    return y, final if output_final_state else None


_library = torch.library.Library("intarsia", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? initial_state, SymInt[] lengths, bool silu"
_library.define(f"conv_forward({_INPUTS}, bool output_final_state) -> (Tensor y, Tensor final_state)")
_library.define(
    f"conv_backward({_INPUTS}, Tensor d_y, Tensor? d_final_state)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_initial_state)"
)


def _outputs(
    x: Tensor, weight: Tensor, lengths: list[int], output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """Room for the results; a state that is not asked for is empty."""
    state = (len(lengths) or x.shape[0], weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(state if output_final_state else (0,), dtype=compute_dtype(x))


def _given(state: Optional) -> Optional:
    """A state that holds something: with one weight a channel there is nothing to remember."""
    return None if state is None or state.numel() == 0 else state


@torch.library.impl(_library, "conv_forward", "CPU")
def _forward(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    y, final = _outputs(x, weight, lengths, output_final_state)
    native.native().conv_forward(
        *detached((x, weight, _given(initial_state))), edges_of(lengths), silu, y, _given(final),
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return y, final


@torch.library.register_fake("intarsia::conv_forward", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, lengths, output_final_state)


def _gradient_room(x: Tensor, weight: Tensor, initial_state: Optional) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients; without an initial state there is none of it."""
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


@torch.library.impl(_library, "conv_backward", "CPU")
def _backward(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    d_y: Tensor,
    d_final_state: Optional,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_initial = room = _gradient_room(x, weight, initial_state)
    d_final = _given(d_final_state)
    native.native().conv_backward(
        *detached((x, weight, _given(initial_state))), edges_of(lengths), silu,
        *detached((rows(d_y), None if d_final is None else d_final.contiguous())), d_x, d_weight, _given(d_initial),
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return room


@torch.library.register_fake("intarsia::conv_backward", lib=_library)
def _backward_fake(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    d_y: Tensor,
    d_final_state: Optional,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_room(x, weight, initial_state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, initial_state, ctx.lengths, ctx.silu, ctx.final = inputs
    ctx.save_for_backward(x, weight, initial_state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_y: Optional, d_final: Optional) -> tuple[Optional, ...]:
    x, weight, initial_state = ctx.saved_tensors
    if torch.is_grad_enabled():
        seqs = Sequences(tuple(ctx.lengths)) if ctx.lengths else None
        again = differentiable_gradients(
            lambda x, weight, state: conv_in_torch(ConvCall(x, weight, ctx.silu, state, True, seqs)),
            ctx.saved_tensors,
            (d_y, d_final if ctx.final else None),
        )
        return (*again, None, None, None)
    d_x, d_weight, d_initial = torch.ops.intarsia.conv_backward(
        x, weight, initial_state, ctx.lengths, ctx.silu,
        torch.zeros_like(x) if d_y is None else d_y, d_final if ctx.final else None,
    )  # fmt: skip
    return d_x, d_weight, None if initial_state is None else d_initial, None, None, None


torch.library.register_autograd(
    "intarsia::conv_forward", _differentiate, setup_context=_setup_context, lib=_library
)
differentiable_once(_library, "intarsia::conv_backward", "the short convolution")

IMPLEMENTATION = implementation(cpu_conv, refuse_conv)
