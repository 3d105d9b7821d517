"""The gated activation of feed-forwards."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.swiglu_call import swiglu_call
from intarsia.ops.table import run


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """`silu(gate) * up` with `silu(x) = x sigmoid(x)` (Shazeer 2020), between a feed-forward's products.

    Computed in float32 (float64 for float64) and rounded once; nothing between the inputs and the output is kept for
    the backward pass. `impl` is `"reference"` (float64), `"torch"`, `"cpu"` (native kernels: one pass) or `"auto"`.

    Args:
        gate, up: `[..., F]`, of one shape and dtype.

    Returns:
        `[..., F]` in the same dtype.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
    """
    y: Tensor = run("swiglu", swiglu_call(gate, up), impl)
    return y
