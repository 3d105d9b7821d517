"""What a loss asks of the softmax over logits, block by block of a large vocabulary."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.softmax_call import log_sum_call, softmax_call
from intarsia.ops.table import run


def log_sum_exp(logits: Tensor, *, impl: str = "auto") -> Tensor:
    """`ln(sum(exp(logits)))` of each row of `[N, V]`: `[N]` float32 (float64 for float64).

    Computed in that dtype, without overflow. `impl` is `"reference"` (float64), `"torch"`, `"cpu"` (native kernels,
    without a copy of bfloat16 logits in float32) or `"auto"`.

    Raises:
        ShapeError: logits that are no matrix of floating-point numbers.
        ConfigError: an unknown `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
    """
    y: Tensor = run("log_sum_exp", log_sum_call(logits), impl)
    return y


def softmax_gradient(
    logits: Tensor, log_sum: Tensor, targets: Tensor, gradient: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The gradient of `log_sum - logits[target]`, the negative log-likelihood, by the logits:
    `(exp(logits - log_sum) - [column == target]) * gradient`, in one pass and rounded once.

    Args:
        logits: `[N, V]`, all columns or a block of them.
        log_sum: `[N]`, of all columns.
        targets: `[N]` int64, counted from the block's first column. One below 0 or from V on is in no column.
        gradient: `[N]`, of the likelihoods.
        impl: as for `log_sum_exp`; the gradient of the kernels' has none itself.

    Returns:
        `[N, V]` in the dtype of the logits.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError, UnsupportedError: as for `log_sum_exp`.
    """
    y: Tensor = run("softmax_gradient", softmax_call(logits, log_sum, targets, gradient), impl)
    return y
