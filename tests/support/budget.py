"""How far an implementation may be from the float64 reference: a bound that is derived, not fitted to a machine.

**What rounding does** to a result is measured on the inputs at hand: each input gets an error as rounding to its
dtype makes it (uniform in half a spacing to either side), the reference computes in float64 what becomes of
that, and the outputs are rounded in the same way. Several such draws are pooled: one draw says little of a
small tensor, and the largest of its errors little of the largest of another's. Call the movement m.

**What a correct implementation adds.** One that works in a wider dtype than its inputs' rounds nothing that
counts beside the inputs: it may add as much again, factor 2 in all.

One that works in the inputs' own dtype rounds again at each of its `stages` (dependent products in a row). The
errors of stages are independent, so they add in squares: `sqrt(stages)`. And it sums in that dtype. Take n
products of size a, and u for the root mean square of a relative error. No order of summation rounds more than
adding one term after the other: sums in blocks, in lanes of a vector or by pairs have shorter chains.

* Signs at random: the partial sums grow as `a sqrt(j)`, and rounding each of them moves the sum by
  `u a sqrt(1 + 2 + .. + n) = u a n / sqrt(2)`. The inputs' errors move it by `u a sqrt(2 n)`: in squares n / 4.
* One sign: the partial sums grow as `a j`, which gives `u a sqrt(n³ / 3)`. Rounding the output moves it by
  `u a n`: in squares n / 3.

So no order exceeds `m sqrt(stages (1 + n / 3))` in the mean; an error may be off from what is expected of it by
the same factor 2. Nothing sums in a dtype narrower than float32, so n is 0 for bfloat16. The largest of N errors
that are sums of many is that of a normal distribution, `sqrt(2 log N)` times the root mean square, where one
rounding never makes more than sqrt(3) times its own. Where the output is rounded last, the largest number alone may
decide, and two draws of its rounding may both be small: half a spacing there is always allowed for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]
Compute = Callable[..., Sequence[Tensor]]

STAGES = 4
"""Of the chunkwise form: scores, inverse, written values, outputs."""
TERMS = 64
"""The longest sums of most: over a chunk's tokens or a head's channels."""
CHANCE = 2
"""How much larger an error may be than what is expected of it."""


def rounded(
    inputs: Inputs, dtype: torch.dtype, float32: frozenset[str] = frozenset()
) -> dict[str, Tensor | None]:
    """The inputs in `dtype`; those named in `float32` are never narrower than float32."""
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    return {
        name: None if x is None else x.to(wide if name in float32 else dtype) for name, x in inputs.items()
    }


def disturbed(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x in float64 with an error as rounding to `dtype` makes it, drawn. 0 and infinity stay."""
    wide = x.double()
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 0.5
    return torch.where(wide.isfinite() & (wide != 0), wide + noise * spacing(wide, dtype), wide)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the numbers of `dtype` around x."""
    return torch.finfo(dtype).eps * torch.exp2(x.double().abs().log2().floor())


def movements(
    reference: Compute, inputs: Inputs, expected: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Iterator[list[Tensor]]:
    """What rounding does to the outputs `expected` of the float64 reference at `inputs`, a draw after the other: two of
    large outputs and up to eight of small ones."""
    generator = torch.Generator().manual_seed(0)
    smallest = min(x.numel() for x in expected)
    for _ in range(min(max(math.ceil(4096 / smallest), 2), 8)):
        moved = reference(
            **{n: None if x is None else disturbed(x, x.dtype, generator) for n, x in inputs.items()}
        )
        yield [
            disturbed(m, dtype, generator) - e for m, e, dtype in zip(moved, expected, dtypes, strict=True)
        ]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def factor(
    dtype: torch.dtype, output: torch.dtype, *, stages: int = STAGES, terms: int = TERMS, inside: bool = False
) -> float:
    """How many times the movement an error may be: see above."""
    if dtype.itemsize >= 4:
        return CHANCE * math.sqrt(stages * (1 + terms / 3))
    if output == dtype and not inside:
        return CHANCE
    return CHANCE * math.sqrt(stages)


def assert_within_budget(
    implementation: Compute,
    reference: Compute,
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    float32: frozenset[str] = frozenset({"g", "beta", "initial_state"}),
    stages: int = STAGES,
    terms: int = TERMS,
    inside: bool = False,
) -> None:
    """Compare `implementation(**inputs in dtype)` with `reference(**the same in float64)`, output by output.

    `inside` says that the implementation rounds to `dtype` after each of its `stages`, however narrow it is;
    `terms` is the length of the longest sums that it makes in float32. Both root-mean-square and largest error
    must keep the budget. Outputs must be finite. An output that is wider than the inputs, such as a state beside
    bfloat16, may show what was rounded in the middle, for it is not rounded at the end.
    """
    narrow = rounded(inputs, dtype, float32)
    expected = reference(**{name: None if x is None else x.double() for name, x in narrow.items()})
    got = implementation(**narrow)
    assert len(got) == len(expected)
    draws = list(movements(reference, narrow, expected, [g.dtype for g in got]))
    for i, (g, e, *moved) in enumerate(zip(got, expected, *draws, strict=True)):
        assert torch.isfinite(g).all(), f"output {i} is not finite"
        error, movement = (g.double() - e).abs(), torch.stack(moved).abs()
        # Of float64 the reference has no better idea.
        floor = torch.finfo(torch.float64).eps * e.abs().max()
        allowed = factor(dtype, g.dtype, stages=stages, terms=terms, inside=inside)
        typical = torch.maximum(rms(movement), floor)
        last = spacing(e.abs().max(), g.dtype) / 2
        tail = math.sqrt(2 * math.log(max(e.numel(), 2))) if allowed > CHANCE else 1.0
        largest = torch.maximum(tail * typical, last)
        for name, measure, usual in (("rms", rms, typical), ("largest", torch.max, largest)):
            budget = allowed * torch.maximum(measure(movement), usual)
            assert measure(error) <= budget, (
                f"output {i}: {name} error {measure(error):.2e} > budget {budget:.2e}"
            )
