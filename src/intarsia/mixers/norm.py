"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia.mixers.filling import FillsItself, GeneratorOf
from intarsia.ops import gated_rms_norm


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
