"""The native gated activation as `torch.library` custom operators; the kernels are in `csrc/swiglu*`."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.native_operator import detached, implementation, refuse, register, rows
from intarsia.ops.swiglu_call import SwigluCall
from intarsia.ops.swiglu_torch import swiglu_in_torch


def refuse_swiglu(call: SwigluCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    if call.up.device != call.gate.device:
        return f"gate is on {call.gate.device} and up on {call.up.device}"
    if call.gate.numel() == 0:
        return f"there is nothing to compute; gate is {list(call.gate.shape)}"
    return refuse("gate", call.gate)


def cpu_swiglu(call: SwigluCall) -> Tensor:
    """Run the activation natively."""
    gate, up = (rows(x.reshape(-1, x.shape[-1])) for x in call)
    y: Tensor = _swiglu(gate, up)
    return y.view(call.gate.shape)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _fake(gate, up)
    native.native().swiglu_forward(
        *detached((gate, up)), y, native.instruction_set(), torch.get_num_threads()
    )
    return y


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _gradient_room(gate: Tensor, up: Tensor, *_: Tensor) -> list[Tensor]:
    return [gate.new_empty(gate.shape), up.new_empty(up.shape)]


def _backward(gate: Tensor, up: Tensor, d_y: Tensor) -> list[Tensor]:
    room = _gradient_room(gate, up)
    native.native().swiglu_backward(
        *detached((gate, up, rows(d_y))), *room, native.instruction_set(), torch.get_num_threads()
    )
    return room


_swiglu = register(
    "swiglu",
    "swiglu",
    tensors="Tensor gate, Tensor up",
    settings="",
    results="Tensor y",
    run=_forward,
    fake=_fake,
    run_backward=_backward,
    fake_backward=_gradient_room,
    again=lambda gate, up: (swiglu_in_torch(SwigluCall(gate, up)),),
)

IMPLEMENTATION = implementation(cpu_swiglu, refuse_swiglu)
