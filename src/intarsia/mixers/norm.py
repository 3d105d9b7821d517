"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension (Zhang and Sennrich 2019).

    Computed in float32 whatever the dtype of `x`, and returned in the dtype of `x`. A zero-centred norm
    multiplies with `1 + weight`, so that weight decay pulls it towards one (Qwen3-Next).
    """

    def __init__(self, d: int, eps: float = 1e-5, zero_centered: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.zeros(d) if zero_centered else torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype)
        if self.zero_centered:
            weight = 1 + weight
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)

    def init_own_weights(self, *_: object) -> None:
        """The norm begins as a plain division by the root mean square."""
        self.weight.fill_(0 if self.zero_centered else 1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"
