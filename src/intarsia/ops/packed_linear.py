"""Linear maps whose weights are packed for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.packed_linear_call import packed_linear_call
from intarsia.ops.packed_weights import PackedWeights
from intarsia.ops.table import run


def packed_linear(
    x: Tensor,
    weights: PackedWeights,
    bias: Tensor | None = None,
    *,
    matrix_of_row: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`y = W x + bias` for every row of x, made for few of them: then reading the weights is what takes the time, and
    each is read once for all rows, as the few bytes that it was packed into.

    Sums are float32. By the native kernels a row's numbers do not depend on the other rows, nor on threads.

    Args:
        x: `[..., K]`, float32, bfloat16 or, not natively, float64.
        weights: of `pack_weights`, `[N, K]`, or several matrices `[E, N, K]`.
        bias: `[N]`, of one matrix.
        matrix_of_row: `[...]` int64, where there are several matrices: which of them a row is multiplied with. Those
            that no row has are not read.
        dtype: of the result; that of x by default.
        impl: `"reference"` (float64), `"torch"`, `"cpu"` (native kernels, and PyTorch's products for many rows) or
            `"auto"`.

    Returns:
        `[..., N]`.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `impl`, a dtype that cannot be, or a row whose matrix there is not.
        UnsupportedError: gradients are asked for; `impl="cpu"` for a call that the kernels cannot serve.
    """
    call = packed_linear_call(x, weights, bias, matrix_of_row=matrix_of_row, dtype=dtype)
    y: Tensor = run("packed_linear", call, impl)
    return y.view(*x.shape[:-1], weights.shape[-2])
