"""Products with packed weights as they are defined, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.packed_linear_call import PackedLinearCall


def packed_linear_reference(call: PackedLinearCall) -> Tensor:
    """`y[r] = W[m(r)] x[r] + bias`, rounded once."""
    x, W = call.x.double(), call.weights.unpacked(torch.float64)
    if call.matrix_of_row is None:
        y = x @ W.view(W.shape[-2:]).mT
    else:
        matrices = W.view(call.weights.matrices, *W.shape[-2:])[call.matrix_of_row]
        y = (matrices @ x[..., None])[..., 0]
    return (y if call.bias is None else y + call.bias.double()).to(call.dtype)


IMPLEMENTATION = Implementation("reference", packed_linear_reference, automatic=False)
