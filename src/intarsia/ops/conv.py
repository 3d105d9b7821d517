"""The short causal convolution that linear mixers put before their queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops.conv_call import Activation, conv_call
from intarsia.ops.pools import InSlots, apart
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run, run_in_slots


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | InSlots | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Any]:
    """Mix each channel with its own last few inputs: `y_t = sum_w weight[:, w] x_{t - W + 1 + w}`.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`; the last column is the weight of the token itself.
        activation: applied to the result; `"silu"` or None.
        initial_state: the `W - 1` inputs before the first, oldest first, `[N, W - 1, D]`; zero by default.
            `InSlots`, they are updated in place and returned as the final state.
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
    state, held = apart(initial_state)
    call = conv_call(
        x, weight, activation=activation, initial_state=state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if held is None:
        y, final = run("short_convolution", call, impl)
        return y, final
    if held.shape != call.state_shape:
        raise ShapeError(f"initial_state must be {list(call.state_shape)}; got {list(held.shape)}")
    return run_in_slots("short_convolution", call, held, impl), held
