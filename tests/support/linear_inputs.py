"""Inputs of the linear operators, in float64, from a seed."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Regime = Literal["mild", "kda", "minus five", "strong", "resets", "none lost", "all lost"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
DECAYS = ("none", "fixed", "head", "channel")


def log_decay(shape: tuple[int, ...], regime: Regime, generator: torch.Generator) -> Tensor:
    """Log-decays: gentle ones, those of KDA at initialisation, and the extremes."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if regime == "mild":
        return -0.05 * F.softplus(normal)
    if regime == "kda":  # exp(A_log) uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]
        return -(1 + 15 * uniform) * 10 ** (-2 + normal.clamp(-1, 1))
    if regime == "minus five":
        return torch.full(shape, -5.0, dtype=torch.float64)
    if regime == "strong":
        return -30 * F.softplus(normal)
    if regime == "resets":
        return torch.where(uniform < 0.1, -torch.inf, 0.1 * -F.softplus(normal))
    if regime == "none lost":
        return torch.zeros(shape, dtype=torch.float64)
    return torch.full(shape, -torch.inf, dtype=torch.float64)


def linear_inputs(
    *,
    B: int = 1,
    T: int,
    H: int = 2,
    HV: int = 2,
    K: int = 8,
    V: int = 12,
    decay: str = "channel",
    regime: Regime = "kda",
    sequences: int | None = None,
    state: bool = True,
    beta_max: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """q, k of length one, v, g, beta, initial_state (of `sequences`, B by default)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {"fixed": (HV,), "head": (B, T, HV), "channel": (B, T, HV, K)}
    return {
        "q": F.normalize(normal(B, T, H, K), dim=-1),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, HV, V),
        "g": None if decay == "none" else log_decay(shapes[decay], regime, generator),
        "beta": beta_max * torch.rand(B, T, HV, generator=generator, dtype=torch.float64),
        "initial_state": normal(sequences or B, HV, K, V) if state else None,
    }
