"""The dtype of products under autocast, for operators that autocast does not know."""

from __future__ import annotations

import torch


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the tensor's device, else the dtype of `tensor`."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
