"""Calls of the gated activation, checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from intarsia.errors import ShapeError


class SwigluCall(NamedTuple):
    """A checked call of `swiglu`: `gate` and `up` `[..., F]`."""

    gate: Tensor
    up: Tensor


def swiglu_call(gate: Tensor, up: Tensor) -> SwigluCall:
    """Check a call of `swiglu`.

    Raises:
        ShapeError: arguments that do not fit together.
    """
    fit = gate.shape == up.shape and gate.dtype == up.dtype
    if not fit or gate.dim() == 0 or not gate.is_floating_point():
        raise ShapeError(
            "gate and up must be [..., F] of one shape and one floating-point dtype; got "
            f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        )
    return SwigluCall(gate, up)
