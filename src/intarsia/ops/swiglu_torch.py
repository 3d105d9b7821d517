"""The gated activation in plain PyTorch, on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.precision import widen
from intarsia.ops.swiglu_call import SwigluCall


def swiglu_in_torch(call: SwigluCall) -> Tensor:
    """What `swiglu` gives."""
    return (F.silu(widen(call.gate)) * widen(call.up)).to(call.gate.dtype)


IMPLEMENTATION = Implementation("torch", swiglu_in_torch)
