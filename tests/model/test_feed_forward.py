"""The feed-forward against its formula in float64."""

from __future__ import annotations

import torch

from intarsia.model.feed_forward import SwiGLU


def test_swiglu():
    module = SwiGLU(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x @ module.gate.weight.T, x @ module.up.weight.T
    torch.testing.assert_close(module(x), (gate * gate.sigmoid() * up) @ module.down.weight.T)
