"""Losses of indexers beside their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.device import device


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device(), dtype)


def check_loss_and_gradients(loss_of: Callable[..., Tensor], x: dict[str, Tensor], **options: Any) -> None:
    """The loss of inputs x, by their names, is the reference's and not negative, and so are the gradients, of
    which queries and keys of attention have none."""
    found = []
    for impl in ("auto", "reference"):
        loss = loss_of(**x, **options, impl=impl)
        grads = torch.autograd.grad(
            (loss * normal(*loss.shape, seed=9)).sum(), list(x.values()), allow_unused=True
        )
        found.append((loss, grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    assert (found[0][0] > -1e-12).all()
    for name, got, expected in zip(x, *(grads for _, grads in found), strict=True):
        assert (got is None) == (expected is None) == (name in ("q", "k")), name
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
