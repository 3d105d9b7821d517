"""Calls of the norms, checked."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError

NormGate = Literal["sigmoid", "swish"]


class NormCall(NamedTuple):
    """A checked call of `gated_rms_norm`: `o`, `z` `[..., V]` (z None without a gate), `weight` `[V]`."""

    o: Tensor
    z: Tensor | None
    weight: Tensor
    eps: float
    gate: NormGate | None


class LengthCall(NamedTuple):
    """A checked call of `l2norm`."""

    x: Tensor
    eps: float


def norm_call(
    o: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, gate: NormGate | None = "sigmoid"
) -> NormCall:
    """Check a call of `gated_rms_norm`.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `gate`.
    """
    if gate not in (None, "sigmoid", "swish"):
        raise ConfigError(f"gate must be 'sigmoid', 'swish' or None; got {gate!r}")
    if o.dim() == 0 or weight.shape != o.shape[-1:]:
        raise ShapeError(f"o must be [..., V] and weight [V]; got {list(o.shape)} and {list(weight.shape)}")
    if (z is None) != (gate is None):
        raise ShapeError(f"gate={gate!r} and z is {'missing' if z is None else 'given'}")
    if z is not None and z.shape != o.shape:
        raise ShapeError(f"z must have the shape of o, {list(o.shape)}; got {list(z.shape)}")
    if not o.is_floating_point():
        raise ShapeError(f"o must be a floating-point tensor; got {o.dtype}")
    return NormCall(o, z, weight, eps, gate)


def length_call(x: Tensor, eps: float = 1e-6) -> LengthCall:
    """Check a call of `l2norm`.

    Raises:
        ShapeError: x has no dimension, or is not of floating-point numbers.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"x must be a floating-point tensor [..., K]; got {x.dtype} {list(x.shape)}")
    return LengthCall(x, eps)
