"""Products with packed weights in plain PyTorch, on any device: some weights at a time are made numbers again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.packed_linear_call import PackedLinearCall
from intarsia.ops.packed_weights import FLOATING, PackedWeights
from intarsia.ops.precision import compute_dtype, widen


def packed_linear_torch(call: PackedLinearCall) -> Tensor:
    """Products of float32, or of bfloat16 where both are that."""
    x, weights = call.x, call.weights
    if call.matrix_of_row is None:
        y = product(x, weights)
    else:
        y = x.new_empty(x.shape[0], weights.shape[-2], dtype=compute_dtype(x))
        for m in range(weights.matrices):
            mine = call.matrix_of_row == m
            y[mine] = product(x[mine], _matrix(weights, m)).to(y.dtype)
    return (y if call.bias is None else widen(y) + call.bias.to(compute_dtype(y))).to(call.dtype)


def product(x: Tensor, weights: PackedWeights) -> Tensor:
    """`x Wᵀ` `[R, N]` with one matrix; bfloat16 if both are, and else float32 (float64 for float64)."""
    if weights.format in FLOATING and weights.data.dtype == x.dtype:
        return F.linear(x, weights.data.flatten(0, -2))
    # Integers times scales need more digits than bfloat16 has.
    wide = widen(x)
    return torch.cat([F.linear(wide, rows.to(wide.dtype)) for rows in weights.pieces()], dim=1)


def _matrix(weights: PackedWeights, m: int) -> PackedWeights:
    """One of several."""
    parts = (None if x is None else x[m] for x in (weights.data, weights.scales, weights.zeros))
    data, scales, zeros = parts
    assert data is not None
    return PackedWeights(weights.format, weights.shape[1:], weights.group, data, scales, zeros)


IMPLEMENTATION = Implementation("torch", packed_linear_torch)
