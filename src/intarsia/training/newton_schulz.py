"""The orthogonalisation at the heart of Muon."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x³ + c x⁵, chosen by Keller Jordan for the steepest slope at zero; five rounds bring
every singular value from about 0.003 upwards into [0.7, 1.2], which is as good as 1 for an optimizer."""


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """`U Vᵀ` of each matrix `U S Vᵀ`, approximately, by the quintic Newton–Schulz iteration.

    Args:
        matrices: `[N, rows, columns]`; the N are independent and multiplied in one batch.
        dtype: of the products. The iteration heals its own rounding, so bfloat16 serves.
        steps: rounds of the iteration.

    Returns:
        `[N, rows, columns]` in `dtype`. A zero matrix gives zero.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # The Frobenius norm bounds the spectral norm, which the iteration needs to be at most 1. First by the
    # largest entry, since the squares of very small or large ones are not representable.
    x = x.float()
    x = x / _norm(x, float("inf"))
    x = (x / _norm(x, 2)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _norm(x: Tensor, order: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, order, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return norm.clamp_min(torch.finfo(torch.float32).tiny)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
