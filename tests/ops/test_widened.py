"""PyTorch's products of bfloat16, whether it has fast ones or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.ops import widened

EPS, U = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=[False, True], ids=["fast", "slow"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(widened, "_bfloat16_is_slow", lambda: request.param)
    is_slow: bool = request.param
    return is_slow


@pytest.mark.parametrize("equation", ["btk,nk->btn", "bthn,hnr->bthr"])
def test_products_are_rounded_once(slow: bool, equation: str) -> None:
    shapes = {"btk,nk->btn": ((2, 7, 33), (5, 33)), "bthn,hnr->bthr": ((1, 7, 3, 33), (3, 33, 5))}[equation]
    x, w = randn(*shapes[0], seed=0), randn(*shapes[1], seed=1)
    y = widened.linear(x, w) if equation == "btk,nk->btn" else widened.einsum(equation, x, w)
    assert y.dtype == torch.bfloat16
    exact = torch.einsum(equation, x.double(), w.double())
    size = torch.einsum(equation, x.double().abs(), w.double().abs())
    assert ((y - exact).abs() <= EPS / 2 * exact.abs() * (1 + EPS) + 33 * U * size).all()


def test_gradients_reach_both_factors(slow: bool) -> None:
    x, w = (randn(4, 6, seed=n).requires_grad_() for n in range(2))
    (widened.linear(x, w) * 2).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, 2 * w.detach().double().sum(0).expand(4, -1).bfloat16())
    torch.testing.assert_close(w.grad, 2 * x.detach().double().sum(0).expand(4, -1).bfloat16())


def test_other_dtypes_are_multiplied_as_they_are(slow: bool) -> None:
    x, w = randn(3, 4, seed=0).double(), randn(5, 4, seed=1).double()
    assert not widened.is_widened(x)
    assert torch.equal(widened.linear(x, w), torch.nn.functional.linear(x, w))
    assert widened.is_widened(x.bfloat16()) == slow
    assert not widened.is_widened(x.bfloat16().to("meta"))


def test_what_is_slow_is_a_constant_of_graphs() -> None:
    compiled = torch.compile(widened.linear, fullgraph=True, backend="eager")
    x, w = randn(3, 4, seed=0), randn(5, 4, seed=1)
    assert torch.equal(compiled(x, w), widened.linear(x, w))
