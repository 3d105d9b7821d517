"""The short causal convolution that linear mixers put before their queries, keys and values."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
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
) -> tuple[Tensor, Tensor | None]:
    """Mix each channel with its own last few inputs: `y_t = sum_w weight[:, w] x_{t - W + 1 + w}`.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`; the last column is the weight of the token itself.
        activation: applied to the result; `"silu"` or None.
        initial_state: the `W - 1` inputs before the first, oldest first, `[N, D, W - 1]`; zero by default.
        output_final_state: whether to return the last `W - 1` inputs.
        cu_seqlens: sequences packed into one row, which do not see each other; cumulative lengths or a
            `Sequences`.

    Returns:
        `y` `[B, T, D]` in the dtype of x, and the final state `[N, D, W - 1]`, float32 (float64 for float64
        inputs), or None.

    Raises:
        ShapeError: arguments that do not fit together.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ShapeError(
            f"x must be [B, T, D] and weight [D, W]; got {list(x.shape)} and {list(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ConfigError(f"activation must be None or 'silu'; got {activation!r}")
    seqs = (
        cu_seqlens
        if isinstance(cu_seqlens, Sequences) or cu_seqlens is None
        else Sequences.from_cu_seqlens(cu_seqlens)
    )
    if seqs is not None and (x.shape[0] != 1 or seqs.total != x.shape[1]):
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); x is {list(x.shape)}"
        )
    count = x.shape[0] if seqs is None else seqs.count
    past = weight.shape[1] - 1
    if initial_state is not None and initial_state.shape != (count, x.shape[2], past):
        raise ShapeError(
            f"initial_state must be {[count, x.shape[2], past]}; got {list(initial_state.shape)}"
        )

    if seqs is not None and (initial_state is not None or output_final_state):
        # Each sequence has a past of its own: convolve them one by one.
        results = [
            _convolve(part, weight, None if initial_state is None else initial_state[n : n + 1], None)
            for n, part in enumerate(x.split(seqs.lengths, dim=1))
        ]
        y = torch.cat([result[0] for result in results], dim=1)
        final = torch.cat([result[1] for result in results])
    else:
        y, final = _convolve(x, weight, initial_state, seqs)
    if activation == "silu":
        y = F.silu(y)
    return y, final if output_final_state else None


def _convolve(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, seqs: Sequences | None
) -> tuple[Tensor, Tensor]:
    past, T = weight.shape[1] - 1, x.shape[1]
    if initial_state is None:
        history = F.pad(x, (0, 0, past, 0))
    else:
        history = torch.cat([initial_state.mT.to(x.dtype), x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, past]
    positions = None if seqs is None else seqs.positions(x.device)[:, None]
    for lag in range(1, past + 1):
        shifted = history[:, past - lag : past - lag + T]
        if positions is not None:
            shifted = shifted.where(positions >= lag, 0)
        y = torch.addcmul(y, shifted, weight[:, past - lag])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, history[:, T:].mT.to(dtype)
