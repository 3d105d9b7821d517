"""The gated RMSNorm in plain PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.precision import widen


def norm_in_torch(o: Tensor, z: Tensor | None, weight: Tensor, eps: float, gate: str | None) -> Tensor:
    """What `gated_rms_norm` gives for checked arguments."""
    wide = widen(o)
    y = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps)
    if z is not None:
        z = z.to(y.dtype)
        y = y * (torch.sigmoid(z) if gate == "sigmoid" else F.silu(z))
    return y.to(o.dtype)
