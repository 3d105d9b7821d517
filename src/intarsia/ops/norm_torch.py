"""The norms in plain PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.norm_call import LengthCall, NormCall
from intarsia.ops.precision import widen


def norm_in_torch(call: NormCall) -> Tensor:
    """What `gated_rms_norm` gives."""
    wide = widen(call.o)
    y = F.rms_norm(wide, call.weight.shape, call.weight.to(wide.dtype), call.eps)
    if call.z is not None:
        z = call.z.to(y.dtype)
        y = y * (torch.sigmoid(z) if call.gate == "sigmoid" else F.silu(z))
    return y.to(call.o.dtype)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """What `l2norm` gives."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _unit(call: LengthCall) -> Tensor:
    return unit(call.x, call.eps)


IMPLEMENTATION = Implementation("torch", norm_in_torch)
OF_LENGTH = Implementation("torch", _unit)
