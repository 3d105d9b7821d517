"""PyTorch's products of bfloat16, by way of float32 where PyTorch has none that are fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.compiler import constant_in_graphs


def is_widened(x: Tensor) -> bool:
    """Whether rows are multiplied in float32 since their own products are slow."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _bfloat16_is_slow()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x Wᵀ`, in the dtype of x."""
    if is_widened(x):
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight)


def einsum(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """`torch.einsum` of two tensors, in the dtype of x."""
    if is_widened(x):
        return torch.einsum(equation, x.float(), y.float()).to(x.dtype)
    return torch.einsum(equation, x, y)


@constant_in_graphs
def _bfloat16_is_slow() -> bool:
    """Without AVX-512 PyTorch multiplies bfloat16 on x86 by plain loops, which take five times as long."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"
