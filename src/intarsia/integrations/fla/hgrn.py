"""The recurrence of HGRN: a decayed sum of each channel, with no matrix."""

from __future__ import annotations

from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.integrations.fla.common import Result, run
from intarsia.ops.precision import widen


def fused_recurrent_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """HGRN (`fla.ops.hgrn`): `h_t = exp(g_t) h_{t-1} + x_t`.

    `x` and the log-decay `g` are `[B, T, D]`, states `[N, D]`; the result has the dtype of x.
    """
    if x.dim() != 3 or g.shape != x.shape:
        raise ShapeError(f"x and g must both be [B, T, D]; got {list(x.shape)} and {list(g.shape)}")
    count = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape != (count, x.shape[2]):
        raise ShapeError(f"initial_state must be {[count, x.shape[2]]}; got {list(initial_state.shape)}")
    # For the operator each channel is a head with one row and one column.
    one = widen(x).new_ones(*x.shape[:2], 1, 1)
    o, state = run(
        one, one, widen(x)[..., None], g, scale=1.0, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        initial_state=None if initial_state is None else initial_state[..., None, None],
    )  # fmt: skip
    return o.squeeze(-1).to(x.dtype), None if state is None else state.flatten(1)


def chunk_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> Result:
    """As `fused_recurrent_hgrn`."""
    return fused_recurrent_hgrn(x, g, initial_state, output_final_state)
