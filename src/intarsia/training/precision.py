"""Which dtype a run computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from intarsia.training.config import Precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass.

    With "bf16" matrix products read bfloat16 copies of float32 weights; the weights themselves, their
    gradients and the optimizer's state are float32, and layers keep float32 where they ask for it (states,
    decays, routers, losses).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
