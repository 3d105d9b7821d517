"""Calls of products with packed weights, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops.packed_weights import PackedWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class PackedLinearCall(NamedTuple):
    """A checked call of `packed_linear`: `x` `[R, K]`, what follows as there."""

    x: Tensor
    weights: PackedWeights
    bias: Tensor | None
    matrix_of_row: Tensor | None
    dtype: torch.dtype


def packed_linear_call(
    x: Tensor,
    weights: PackedWeights,
    bias: Tensor | None = None,
    *,
    matrix_of_row: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PackedLinearCall:
    """Check a call of `packed_linear`.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: a row whose matrix there is not.
        UnsupportedError: gradients are recorded, and the call would have some.
    """
    N, K = weights.shape[-2:]
    if x.dim() < 1 or x.shape[-1] != K or x.dtype not in DTYPES:
        raise ShapeError(
            f"x must be [..., {K}] of floating-point numbers, as the weights are {list(weights.shape)}; "
            f"got {list(x.shape)} {x.dtype}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"the result can be float32, bfloat16 or float64; got {dtype}")
    if bias is not None and (bias.shape != (N,) or weights.matrices > 1):
        raise ShapeError(f"bias must be [{N}], of one matrix; got {list(bias.shape)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        raise UnsupportedError(
            "packed weights are for inference and have no gradients: train the model or the layer that they were "
            "packed from, or use torch.no_grad()"
        )
    rows = x.flatten(0, -2) if x.dim() != 1 else x[None]
    if matrix_of_row is None:
        if len(weights.shape) == 3 and weights.matrices > 1:
            raise ShapeError(f"there are {weights.matrices} matrices: matrix_of_row says which a row has")
    else:
        if matrix_of_row.shape != x.shape[:-1] or matrix_of_row.dtype != torch.int64:
            raise ShapeError(
                f"matrix_of_row must be {list(x.shape[:-1])} int64, one of each row of x; "
                f"got {list(matrix_of_row.shape)} {matrix_of_row.dtype}"
            )
        matrix_of_row = matrix_of_row.reshape(-1)
        # On other devices looking would wait for them.
        if matrix_of_row.device.type == "cpu" and not torch.compiler.is_compiling() and len(matrix_of_row):
            low, high = int(matrix_of_row.min()), int(matrix_of_row.max())
            if low < 0 or high >= weights.matrices:
                raise ConfigError(
                    f"matrix_of_row must name matrices 0 .. {weights.matrices - 1}; got {low if low < 0 else high}"
                )
    return PackedLinearCall(rows, weights, bias, matrix_of_row, x.dtype if dtype is None else dtype)
