"""The norms as they are defined, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.norm_call import LengthCall, NormCall


def norm_reference(call: NormCall) -> Tensor:
    """`weight * o / sqrt(mean(o²) + eps) * gate(z)`, rounded once to the dtype of o."""
    o = call.o.double()
    y = call.weight.double() * o / (o.square().mean(-1, keepdim=True) + call.eps).sqrt()
    if call.z is not None:
        z = call.z.double()
        y = y * torch.sigmoid(z) * (z if call.gate == "swish" else 1)
    return y.to(call.o.dtype)


def _unit_reference(call: LengthCall) -> Tensor:
    """`x / sqrt(sum(x²) + eps)`, rounded once to the dtype of x."""
    x = call.x.double()
    return (x / (x.square().sum(-1, keepdim=True) + call.eps).sqrt()).to(call.x.dtype)


IMPLEMENTATION = Implementation("reference", norm_reference, automatic=False)
OF_LENGTH = Implementation("reference", _unit_reference, automatic=False)
