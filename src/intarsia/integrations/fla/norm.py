"""RMSNorm times a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.ops import gated_rms_norm
from intarsia.ops.norm import NormGate
from intarsia.ops.precision import widen

_GATES: dict[str, NormGate] = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None = None, activation: str = "swish",
    residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`(weight * y / sqrt(mean(y²) + eps) + bias) * gate(g)` with `y = x + residual` (`fla.modules.fused_norm_gate`).

    All `[..., V]`; the gate is `"swish"` (also called `"silu"`) or `"sigmoid"`. The result has the dtype of x. With
    `prenorm` y is returned besides, in the dtype of `residual`; without one in float32 with `residual_in_fp32`, else
    in that of x.
    """
    gate = _gate(activation)
    y = x if residual is None else widen(x) + widen(residual)
    wide = widen(y)
    ones = wide.new_ones(x.shape[-1:]) if weight is None else weight
    z = g.reshape(x.shape)
    if bias is None:
        out = gated_rms_norm(y, z, ones, eps=eps, gate=gate)
    else:
        normed = gated_rms_norm(wide, None, ones, eps=eps, gate=None) + bias
        out = normed * torch.sigmoid(widen(z)) * (widen(z) if gate == "swish" else 1)
    out = out.to(x.dtype)
    if not prenorm:
        return out
    kept = residual.dtype if residual is not None else wide.dtype if residual_in_fp32 else x.dtype
    return out, y.to(kept)


class FusedRMSNormGated(nn.Module):
    """`fla.modules.FusedRMSNormGated`: `rms_norm_gated` with a weight `[hidden_size]` that begins at one (none with
    `elementwise_affine=False`)."""

    weight: Tensor | None

    def __init__(
        self, hidden_size: int, elementwise_affine: bool = True, eps: float = 1e-5, activation: str = "swish",
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _gate(activation)
        self.hidden_size, self.eps, self.activation = hidden_size, eps, activation
        self.elementwise_affine = elementwise_affine
        weight = (
            nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        )
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Make the weight one again."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, g: Tensor, residual: Tensor | None = None, prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """`rms_norm_gated` of x and g, `[..., hidden_size]`."""
        return rms_norm_gated(
            x, g, self.weight, None, self.activation, residual, prenorm, residual_in_fp32, self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, activation={self.activation}"


def _gate(activation: str) -> NormGate:
    if activation not in _GATES:
        raise ConfigError(f"activation must be one of {', '.join(_GATES)}; got {activation!r}")
    return _GATES[activation]
