"""The native gated RMSNorm as `torch.library` custom operators; the kernels are in `csrc/norm*`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.native_operator import (
    DTYPES,
    Optional,
    detached,
    implementation,
    refuse,
    register,
    rows,
)
from intarsia.ops.norm_call import NormCall, NormGate
from intarsia.ops.norm_torch import norm_in_torch
from intarsia.ops.precision import compute_dtype


def refuse_norm(call: NormCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    o = call.o
    for tensor in (call.weight, call.z):
        if tensor is not None and tensor.device != o.device:
            return f"o is on {o.device} and another argument on {tensor.device}"
    if o.numel() == 0:
        return f"there is nothing to compute; o is {list(o.shape)}"
    return refuse("o", o)


def cpu_norm(call: NormCall) -> Tensor:
    """Run the norm natively."""
    o, z, weight, eps, gate = call
    dtype = compute_dtype(o)
    y: Tensor = _norm(
        _four(o),
        None if z is None else _four(z if z.dtype in DTYPES else z.to(dtype)),
        (weight if weight.dtype in DTYPES else weight.to(dtype)).contiguous(),
        eps,
        gate or "none",
    )
    return y if o.dim() == 4 else y.view(o.shape)


def _four(x: Tensor) -> Tensor:
    """`[..., V]` in four dimensions, as the kernels take it, without a copy where the strides allow it."""
    x = rows(x)
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


def _forward(o: Tensor, z: Optional, weight: Tensor, eps: float, gate: str) -> Tensor:
    y = torch.empty_like(o, memory_format=torch.contiguous_format)
    native.native().norm_forward(
        *detached((o, z, weight)), eps, gate, y, native.instruction_set(), torch.get_num_threads()
    )
    return y


def _fake(o: Tensor, z: Optional, weight: Tensor, eps: float, gate: str) -> Tensor:
    return o.new_empty(o.shape)


def _gradient_room(o: Tensor, z: Optional, weight: Tensor, *_: Any) -> list[Tensor]:
    """Room for the gradients; without a gate there is none of z."""
    d_z = o.new_empty(0) if z is None else z.new_empty(z.shape)
    return [o.new_empty(o.shape), d_z, weight.new_empty(weight.shape)]


def _backward(o: Tensor, z: Optional, weight: Tensor, eps: float, gate: str, d_y: Tensor) -> list[Tensor]:
    d_o, d_z, d_weight = room = _gradient_room(o, z, weight)
    native.native().norm_backward(
        *detached((o, z, weight)), eps, gate, rows(d_y).detach(), d_o, None if z is None else d_z, d_weight,
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return room


def _again(o: Tensor, z: Optional, weight: Tensor, eps: float, gate: str) -> tuple[Optional, ...]:
    return (norm_in_torch(NormCall(o, z, weight, eps, None if z is None else cast(NormGate, gate))),)


_norm = register(
    "norm",
    "the gated RMSNorm",
    tensors="Tensor o, Tensor? z, Tensor weight",
    settings="float eps, str gate",
    results="Tensor y",
    run=_forward,
    fake=_fake,
    run_backward=_backward,
    fake_backward=_gradient_room,
    again=_again,
)

IMPLEMENTATION = implementation(cpu_norm, refuse_norm)
