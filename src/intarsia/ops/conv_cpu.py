"""The native short convolution as `torch.library` custom operators; the kernels are in `csrc/conv*`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.conv_call import ConvCall
from intarsia.ops.conv_torch import conv_in_torch
from intarsia.ops.decode_call import FEW
from intarsia.ops.native_operator import (
    DTYPES,
    Optional,
    detached,
    edges_of,
    implementation,
    refuse,
    register,
    rows,
)
from intarsia.ops.pools import InSlots
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import apart_from_torch


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
    y, final = _conv(
        rows(x),
        (weight if weight.dtype in DTYPES else weight.to(dtype)).contiguous(),
        None if initial_state is None else initial_state.to(dtype).contiguous(),
        [] if seqs is None else list(seqs.lengths),
        silu,
        output_final_state,
    )
    return y, final if output_final_state else None


def conv_in_slots(call: ConvCall, held: InSlots) -> Tensor | None:
    """The outputs of a call of few tokens of each sequence, whose last inputs are read and written where they are held;
    None of other calls."""
    lengths, x, weight, room = call.lengths, call.x, call.weight, held.room
    if max(lengths) > FEW or room.dtype != compute_dtype(x) or not apart_from_torch(x, weight, room):
        return None
    slots = held.places.slots(lengths)
    y = x.new_empty(x.shape)
    native.native().conv_forward(
        *detached((rows(x), (weight if weight.dtype in DTYPES else weight.to(room.dtype)).contiguous())),
        _given(room), [] if call.seqs is None else edges_of(list(slots.lengths)), call.silu, y, _given(room),
        native.instruction_set(), torch.get_num_threads(), slots.read, slots.write,
    )  # fmt: skip
    return y


def _outputs(
    x: Tensor, weight: Tensor, lengths: list[int], output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """Room for the results; a state that is not asked for is empty."""
    state = (len(lengths) or x.shape[0], weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(state if output_final_state else (0,), dtype=compute_dtype(x))


def _given(state: Optional) -> Optional:
    """A state that holds something: with one weight a channel there is nothing to remember."""
    return None if state is None or state.numel() == 0 else state


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


def _fake(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, lengths, output_final_state)


def _gradient_room(x: Tensor, weight: Tensor, initial_state: Optional, *_: Any) -> list[Tensor]:
    """Room for the gradients; without an initial state there is none of it."""
    return [
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    ]


def _backward(
    x: Tensor,
    weight: Tensor,
    initial_state: Optional,
    lengths: list[int],
    silu: bool,
    d_y: Tensor,
    d_final_state: Optional,
) -> list[Tensor]:
    d_x, d_weight, d_initial = room = _gradient_room(x, weight, initial_state)
    d_final = _given(d_final_state)
    native.native().conv_backward(
        *detached((x, weight, _given(initial_state))), edges_of(lengths), silu,
        *detached((rows(d_y), None if d_final is None else d_final.contiguous())), d_x, d_weight, _given(d_initial),
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return room


def _again(
    x: Tensor, weight: Tensor, state: Optional, lengths: list[int], silu: bool
) -> tuple[Optional, ...]:
    seqs = Sequences(tuple(lengths)) if lengths else None
    return conv_in_torch(ConvCall(x, weight, silu, state, True, seqs))


_conv = register(
    "conv",
    "the short convolution",
    tensors="Tensor x, Tensor weight, Tensor? initial_state",
    settings="SymInt[] lengths, bool silu",
    wanted="bool output_final_state",
    results="Tensor y, Tensor final_state",
    run=_forward,
    fake=_fake,
    run_backward=_backward,
    fake_backward=_gradient_room,
    again=_again,
)

IMPLEMENTATION = replace(implementation(cpu_conv, refuse_conv), in_slots=conv_in_slots)
