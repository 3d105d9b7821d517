"""The short causal convolution that linear mixers put before their queries, keys and values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.conv_torch import conv_in_torch
from intarsia.ops.cpu_common import prefers_kernels
from intarsia.ops.cpu_conv import cpu_conv, refuse_conv
from intarsia.ops.sequences import Sequences

Activation = Literal["silu"]


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
        impl: `"cpu"` (native kernels: float32 inside, one rounding), `"torch"` (plain PyTorch in the dtype of x,
            on any device) or `"auto"`: the kernels for tensors on the CPU that they can read.

    Returns:
        `y` `[B, T, D]` in the dtype of x, and the final state `[N, W - 1, D]`, float32 (float64 for float64
        inputs), or None.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `activation` or `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ShapeError(
            f"x must be [B, T, D] and weight [D, W]; got {list(x.shape)} and {list(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ConfigError(f"activation must be None or 'silu'; got {activation!r}")
    seqs = None if cu_seqlens is None else Sequences.from_cu_seqlens(cu_seqlens)
    if seqs is not None and (x.shape[0] != 1 or seqs.total != x.shape[1]):
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); x is {list(x.shape)}"
        )
    count = x.shape[0] if seqs is None else seqs.count
    past = weight.shape[1] - 1
    if initial_state is not None and initial_state.shape != (count, past, x.shape[2]):
        raise ShapeError(
            f"initial_state must be {[count, past, x.shape[2]]}; got {list(initial_state.shape)}"
        )

    if prefers_kernels(impl, refuse_conv(x, weight, initial_state), x):
        lengths = [] if seqs is None else list(seqs.lengths)
        return cpu_conv(x, weight, activation == "silu", initial_state, output_final_state, lengths)
    return conv_in_torch(x, weight, activation == "silu", initial_state, output_final_state, seqs)
