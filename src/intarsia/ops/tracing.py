"""What in PyTorch follows the calls that are made, and must see what they compute.

The native kernels work on memory: a program that is traced, a transform of `torch.func` or a dual number would go past
them unseen, and its result be wrong without a word.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transform() -> str | None:
    """The transform of derivatives or batches that is at work, which knows PyTorch's own operations alone, or None.

    Under torch.compile there is none to be seen: its tracer asks the operators by their registration.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work (grad, vmap, jvp, …), which looks into PyTorch's own operations"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed, which only PyTorch's own operations have"
    return None


def observed() -> bool:
    """Whether calls must go through PyTorch's dispatcher: something traces them, counts them, or puts tensors without
    memory in the place of others."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
