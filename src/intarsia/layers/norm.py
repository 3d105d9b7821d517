"""Root-mean-square normalisation, alone and with a gate, and layer normalisation."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.ops import gated_rms_norm
from intarsia.ops.precision import widen

OutputGate = Literal["sigmoid", "swish", "none"]
"""What a head's output is multiplied by: a sigmoid or SiLU of a projection of the input, or nothing."""


class RMSNorm(FillsItself):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension (Zhang and Sennrich 2019).

    Computed in float32 whatever the dtype of `x`, and returned in the dtype of `x`. A zero-centred norm
    multiplies with `1 + weight`, so that weight decay pulls it towards one (Qwen3-Next).
    """

    def __init__(self, d: int, eps: float = 1e-5, zero_centered: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        weight: Tensor = self.weight
        if self.zero_centered:
            weight = 1 + weight.to(torch.promote_types(x.dtype, torch.float32))
        return gated_rms_norm(x, None, weight, eps=self.eps, gate=None)

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """The norm begins as a plain division by the root mean square."""
        self.weight.fill_(0 if self.zero_centered else 1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"


class LayerNorm(FillsItself):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (Ba et al. 2016), in float32."""

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`, in the dtype of x."""
        wide = widen(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedNorm(FillsItself):
    """RMSNorm of each head, times a gate: `weight * o / rms(o) * gate(z)`, in float32. Weight `[head_v_dim]`. Each of
    `groups` of the channels is divided by a root mean square of its own."""

    def __init__(self, dim: int, eps: float, gate: OutputGate, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.gate, self.groups = eps, gate, groups
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        nn.init.ones_(self.weight)

    def forward(self, o: Tensor, z: Tensor | None) -> Tensor:
        """`o` `[B, T, HV, V]` and the raw gate `z` (None where `gate` is "none"), of the same shape or flat,
        `[B, T, HV * V]`; the result in o's dtype."""
        z = None if z is None else z.view(o.shape)
        if self.groups > 1:
            wide = widen(o).unflatten(-1, (self.groups, -1))
            y = F.rms_norm(wide, wide.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(wide.dtype)
            if z is not None:
                y = y * (torch.sigmoid if self.gate == "sigmoid" else F.silu)(z.to(wide.dtype))
            return y.to(o.dtype)
        return gated_rms_norm(
            o, z, self.weight, eps=self.eps, gate=None if self.gate == "none" else self.gate
        )
