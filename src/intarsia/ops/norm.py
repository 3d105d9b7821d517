"""Normalisations that belong to the operators."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.cpu_common import prefers_kernels
from intarsia.ops.cpu_norm import cpu_norm, refuse_norm
from intarsia.ops.norm_torch import norm_in_torch
from intarsia.ops.precision import widen

NormGate = Literal["sigmoid", "swish"]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x²) + eps)` over the last dimension, in float32, returned in the dtype of x.

    The epsilon stands under the root, as in flash-linear-attention and the published models; this is not
    `torch.nn.functional.normalize`.
    """
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm(
    o: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    gate: NormGate | None = "sigmoid",
    impl: str = "auto",
) -> Tensor:
    """RMSNorm over the last dimension times a gate: `weight * o / sqrt(mean(o²) + eps) * gate(z)`.

    What a linear mixer does to the outputs of its heads (Kimi Linear report, 2025, section 3: sigmoid; Gated
    DeltaNet, arXiv:2412.06464: swish). Computed in float32 (float64 for float64) and rounded once.

    Args:
        o: `[..., V]`, floating-point.
        z: what the gate is made of, in the shape of o; None without a gate. Its dtype may be another.
        weight: `[V]`, in any floating-point dtype.
        eps: under the root.
        gate: `"sigmoid"`, `"swish"` (`z sigmoid(z)`, also called SiLU), or None for the norm alone.
        impl: `"cpu"` (native kernels), `"torch"` (plain PyTorch, on any device) or `"auto"`: the kernels for tensors
            on the CPU that they can read.

    Returns:
        `[..., V]` in the dtype of o.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `gate` or `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
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
    if prefers_kernels(impl, refuse_norm(o, z, weight), o):
        return cpu_norm(o, z, weight, eps, gate)
    return norm_in_torch(o, z, weight, eps, gate)
