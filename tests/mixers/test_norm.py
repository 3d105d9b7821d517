"""RMSNorm against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from intarsia.layers.norm import RMSNorm


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(zero_centered, dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-3, zero_centered=zero_centered)
    x = 3 * torch.randn(5, 24, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
    norm.to(dtype)
    wide, weight = x.double(), norm.weight.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + zero_centered)
    got = norm(x)
    assert got.dtype == dtype
    # Inside all is float32: what is left is the rounding of the result.
    torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_fresh_norm_divides_only(zero_centered):
    norm = RMSNorm(8, zero_centered=zero_centered)
    with torch.no_grad():
        norm.weight.fill_(7)
        norm.reset_parameters()
    assert norm(torch.ones(8)).allclose(torch.ones(8), atol=1e-4)
