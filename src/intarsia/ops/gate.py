"""The gate that makes a log-decay of a raw projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class Gate:
    """How the operators read `g` where it holds raw numbers `f`, `[B, T, HV, K]` or `[B, T, HV]`.

    softplus (`lower_bound` None): `g = -exp(A_log) softplus(f + dt_bias)` (Mamba, Gated DeltaNet, Kimi Linear)
    bounded (`lower_bound` < 0):   `g = lower_bound sigmoid(exp(A_log) (f + dt_bias))`

    `A_log` `[HV]`; `dt_bias` `[HV * K]` for a decay of each channel, `[HV]` for one of each head, or None.
    Computed in float32 (float64 for a float64 `f`), whatever dtypes `A_log` and `dt_bias` are kept in.
    """

    A_log: Tensor
    dt_bias: Tensor | None = None
    lower_bound: float | None = None

    def log_decay(self, f: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`g <= 0` in the shape of `f`, computed in `dtype`: float32 or float64, by default as `f` wants it."""
        dtype = compute_dtype(f) if dtype is None else dtype
        wide = f.to(dtype)
        heads = self.A_log.shape[0]
        per_channel = f.dim() == 4
        if self.dt_bias is not None:
            bias = self.dt_bias.to(dtype)
            wide = wide + (bias.view(heads, -1) if per_channel else bias)
        rate = self.A_log.to(dtype).exp()
        if per_channel:
            rate = rate[:, None]
        if self.lower_bound is None:
            return -rate * F.softplus(wide)
        return self.lower_bound * torch.sigmoid(rate * wide)
