"""The error budgets themselves: any order of summation keeps them, a wrong term does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.budget import assert_within_budget

ROWS, TERMS = 64, 256


def exact(a: Tensor, b: Tensor) -> list[Tensor]:
    return [(a * b).sum(-1)]


def summed(terms: Tensor) -> Tensor:
    """One after the other, which rounds most."""
    total = torch.zeros_like(terms[:, 0])
    for term in terms.unbind(1):
        total = total + term
    return total


def by_halves(terms: Tensor) -> Tensor:
    return terms[:, 0] if terms.shape[1] == 1 else sum(by_halves(half) for half in terms.chunk(2, dim=1))


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward": summed,
    "backward": lambda x: summed(x.flip(1)),
    "shuffled": lambda x: summed(
        x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]
    ),
    "smallest first": lambda x: summed(x.gather(1, x.abs().argsort(1))),
    "largest first": lambda x: summed(x.gather(1, x.abs().argsort(1, descending=True))),
    "in eight lanes": lambda x: summed(torch.stack([summed(lane) for lane in x.chunk(8, dim=1)], 1)),
    "by halves": by_halves,
    "PyTorch's": lambda x: x.sum(-1),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a term too few": lambda x: x[:, 1:].sum(-1),
    "a term twice": lambda x: x.sum(-1) + x[:, 7],
    "the sum before": lambda x: x.roll(1, 0).sum(-1),
    "a factor of 1.001": lambda x: 1.001 * x.sum(-1),
    "terms in bfloat16": lambda x: x.bfloat16().float().sum(-1),
    "sums in bfloat16": lambda x: summed(x.bfloat16()).float(),
}


def inputs(positive: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, ROWS, TERMS, generator=generator, dtype=torch.float64)
    return {"a": a.abs(), "b": b.abs()} if positive else {"a": a, "b": b}


def check(order: Callable[[Tensor], Tensor], positive: bool, seed: int) -> None:
    assert_within_budget(
        lambda a, b: [order(a * b)], exact, inputs(positive, seed), torch.float32, stages=1, terms=TERMS
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("positive", [False, True])
def test_any_order_of_summation_keeps_the_budget(order: str, positive: bool) -> None:
    for seed in range(20):
        check(ORDERS[order], positive, seed)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("positive", [False, True])
def test_a_wrong_term_breaks_the_budget(wrong: str, positive: bool) -> None:
    for seed in range(20):
        with pytest.raises(AssertionError, match="budget"):
            check(WRONG[wrong], positive, seed)
