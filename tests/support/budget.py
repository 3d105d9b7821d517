"""How far an implementation may be from the float64 reference: a bound that is derived, not guessed.

Rounding the inputs to a dtype already moves the exact result, and rounding the outputs moves it again. That
movement is measured on the inputs at hand. An implementation that works in a wider dtype than its inputs may
add at most as much again (factor 2 in all). One that works in the inputs' own dtype rounds again after every
dependent product; the chunkwise form has four of them (scores, inverse, written values, outputs), so it gets
four times that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]
Compute = Callable[..., Sequence[Tensor]]

STAGES = 4


def rounded(
    inputs: Inputs, dtype: torch.dtype, float32: frozenset[str] = frozenset()
) -> dict[str, Tensor | None]:
    """The inputs in `dtype`; those named in `float32` are never narrower than float32."""
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    return {
        name: None if x is None else x.to(wide if name in float32 else dtype) for name, x in inputs.items()
    }


def assert_within_budget(
    implementation: Compute,
    reference: Compute,
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    float32: frozenset[str] = frozenset({"g", "beta", "initial_state"}),
    stages: int = STAGES,
    inside: bool = False,
) -> None:
    """Compare `implementation(**inputs in dtype)` with `reference(**inputs in float64)`, output by output.

    `inside` says that the implementation rounds to `dtype` after each of its `stages`, however narrow it is.
    Both root-mean-square and largest error must keep the budget. Outputs must be finite.
    """
    narrow = rounded(inputs, dtype, float32)
    exact = reference(**inputs)
    expected = reference(**{name: None if x is None else x.double() for name, x in narrow.items()})
    got = implementation(**narrow)
    assert len(got) == len(expected)
    for i, (g, e, x) in enumerate(zip(got, expected, exact, strict=True)):
        assert torch.isfinite(g).all(), f"output {i} is not finite"
        rounding = (e.to(g.dtype).double() - x).abs()
        error = (g.double() - e).abs()
        factor = 2 if dtype.itemsize < 4 and g.dtype == dtype and not inside else 2 * stages
        # Below a few roundings of the largest value there is nothing to compare with.
        floor = torch.finfo(g.dtype).eps * e.abs().max()
        for name, measure in (("rms", lambda t: t.square().mean().sqrt()), ("largest", torch.max)):
            budget = factor * torch.maximum(measure(rounding), floor)
            assert measure(error) <= budget, (
                f"output {i}: {name} error {measure(error):.2e} > budget {budget:.2e}"
            )
