"""Products with packed weights in plain PyTorch, on any device: some weights at a time are made numbers again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.packed_linear_call import PackedLinearCall
from intarsia.ops.packed_weights import FLOATING, PackedWeights
from intarsia.ops.precision import compute_dtype, widen
from intarsia.ops.widened import is_widened

WIDENED_ROWS = 256
"""Rows of weights that are made float32 at a time for rows of bfloat16: with fewer the products are slower, more are
more memory."""


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
    """`x Wᵀ` `[R, N]` with one matrix; bfloat16 if both are and that is fast, else float32 (float64 for float64)."""
    if weights.format in FLOATING and weights.data.dtype == x.dtype and not is_widened(x):
        return F.linear(x, weights.data.flatten(0, -2))
    # Integers times scales need more digits than bfloat16 has.
    wide = widen(x)
    pieces = weights.pieces(WIDENED_ROWS if is_widened(x) else None)
    return torch.cat([F.linear(wide, rows.to(wide.dtype)) for rows in pieces], dim=1)


def _matrix(weights: PackedWeights, m: int) -> PackedWeights:
    """One of several."""
    parts = (None if x is None else x[m] for x in (weights.data, weights.scales, weights.zeros))
    data, scales, zeros = parts
    assert data is not None
    return PackedWeights(weights.format, weights.shape[1:], weights.group, data, scales, zeros)


IMPLEMENTATION = Implementation("torch", packed_linear_torch)
