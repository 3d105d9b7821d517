"""What is computed in which dtype: float64 for float64, float32 for everything else, and what autocast wants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def widen(x: Tensor) -> Tensor:
    """x in the dtype that it is computed in."""
    return x.to(compute_dtype(x))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the tensor's device, else the dtype of `tensor`."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block without autocast for the tensor's device (the meta device has none)."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
