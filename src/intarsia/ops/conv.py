"""The short causal convolution that linear mixers put before their queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.conv_call import Activation, conv_call
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mix each channel with its own last few inputs: `y_t = sum_w weight[:, w] x_{t - W + 1 + w}`.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`; the last column is the weight of the token itself.
        activation: applied to the result; `"silu"` or None.
        initial_state: the `W - 1` inputs before the first, oldest first, `[N, W - 1, D]`; zero by default.
        output_final_state: whether to return the last `W - 1` inputs.
        cu_seqlens: sequences packed into one row, which do not see each other; cumulative lengths or a
            `Sequences`.
        impl: `"reference"` (float64), `"torch"` (plain PyTorch in the dtype of x, on any device), `"cpu"` (native
            kernels: float32 inside, one rounding) or `"auto"`: the kernels for tensors on the CPU that they can read.

    Returns:
        `y` `[B, T, D]` in the dtype of x, and the final state `[N, W - 1, D]`, float32 (float64 for float64
        inputs), or None.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `activation` or `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
    """
    call = conv_call(
        x, weight, activation=activation, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    y, final = run("short_convolution", call, impl)
    return y, final
