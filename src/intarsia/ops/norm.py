"""Normalisations that belong to the operators."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.norm_call import NormGate, length_call, norm_call
from intarsia.ops.table import run


def l2norm(x: Tensor, eps: float = 1e-6, *, impl: str = "auto") -> Tensor:
    """`x / sqrt(sum(x²) + eps)` over the last dimension, in float32, returned in the dtype of x.

    The epsilon stands under the root, as in flash-linear-attention and the published models; this is not
    `torch.nn.functional.normalize`. `impl` is `"auto"`, `"torch"` or `"reference"` (float64); the linear operators do
    it themselves where they are told to `normalize`.

    Raises:
        ShapeError: x has no dimension, or is not of floating-point numbers.
        ConfigError, UnsupportedError: an `impl` that there is not.
    """
    y: Tensor = run("l2norm", length_call(x, eps), impl)
    return y


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
        impl: `"reference"` (float64), `"torch"` (plain PyTorch, on any device), `"cpu"` (native kernels) or `"auto"`:
            the kernels for tensors on the CPU that they can read.

    Returns:
        `[..., V]` in the dtype of o.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `gate` or `impl`.
        UnsupportedError: `impl="cpu"` for a call that the kernels cannot serve.
    """
    y: Tensor = run("gated_rms_norm", norm_call(o, z, weight, eps=eps, gate=gate), impl)
    return y
