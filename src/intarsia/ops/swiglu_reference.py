"""The gated activation as it is defined, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.swiglu_call import SwigluCall


def swiglu_reference(call: SwigluCall) -> Tensor:
    """`gate * sigmoid(gate) * up`, rounded once."""
    gate = call.gate.double()
    return (gate * torch.sigmoid(gate) * call.up.double()).to(call.gate.dtype)


IMPLEMENTATION = Implementation("reference", swiglu_reference, automatic=False)
