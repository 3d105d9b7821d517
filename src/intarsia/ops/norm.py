"""Normalisations that belong to the operators."""

from __future__ import annotations

import torch
from torch import Tensor


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x²) + eps)` over the last dimension, in float32, returned in the dtype of x.

    The epsilon stands under the root, as in flash-linear-attention and the published models; this is not
    `torch.nn.functional.normalize`.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
