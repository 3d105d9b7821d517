"""Functions whose loops follow the lengths of sequences, as operators that torch.compile does not look into.

A traced loop holds for the lengths that it was traced with: each other length is another graph, and after a few of them
PyTorch gives up. So, where the lengths of a graph are not constants, such a function stands in it as one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from intarsia.ops.compiler import is_static

Tensors = Sequence[Tensor | None]
Numbers = Sequence[float]
Function = Callable[[Tensors, Sequence[int], Numbers], Sequence[Tensor]]

_library = torch.library.Library("intarsia", "FRAGMENT")


class Uncompiled:
    """A function of tensors (or None), the lengths of sequences, and numbers, to tensors. Of whole numbers there is no
    gradient.

    Called by this object it is traced, as any function is, where the lengths are constants, and an operator where they
    are not. Of the operator the inputs are kept for the backward pass, which computes the function again.
    """

    def __init__(self, name: str, inputs: int, results: int, function: Function, outputs: Function) -> None:
        """
        Args:
            name: of the operator, `intarsia::<name>`.
            inputs, results: how many tensors there are of each.
            function: computes the results, in PyTorch's own operations.
            outputs: tensors of their shapes and dtypes, whatever is in them.
        """
        self.function = function
        given = ", ".join(f"Tensor? x{n}" for n in range(inputs))
        gradients = ", ".join(f"Tensor? d{n}" for n in range(results))
        rest = "SymInt[] lengths, float[] numbers"
        _library.define(f"{name}({given}, {rest}) -> ({', '.join(['Tensor'] * results)})")
        _library.define(f"{name}_backward({given}, {rest}, {gradients}) -> Tensor[]")
        self.operator = getattr(torch.ops.intarsia, name).default
        backward = getattr(torch.ops.intarsia, f"{name}_backward").default

        def returned(found: Sequence[Tensor]) -> Any:
            return found[0] if results == 1 else tuple(found)

        def run(*arguments: Any) -> Any:
            *tensors, lengths, numbers = arguments
            return returned(_apart(function(tensors, lengths, numbers)))

        def fake(*arguments: Any) -> Any:
            *tensors, lengths, numbers = arguments
            return returned(outputs(tensors, lengths, numbers))

        def run_backward(*arguments: Any) -> list[Tensor]:
            tensors, (lengths, numbers, *ds) = arguments[:inputs], arguments[inputs:]
            leaves = [x if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            with torch.enable_grad():
                ys = function(leaves, lengths, numbers)
            pairs = [(y, d) for y, d in zip(ys, ds, strict=True) if d is not None]
            there = [x for x in leaves if differentiable(x)]
            found = torch.autograd.grad(*_columns(pairs, there), allow_unused=True)
            return _apart(
                [torch.zeros_like(x) if d is None else d for d, x in zip(found, there, strict=True)]
            )

        def fake_backward(*arguments: Any) -> list[Tensor]:
            return [x.new_empty(x.shape) for x in arguments[:inputs] if differentiable(x)]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *tensors, ctx.lengths, ctx.numbers = inputs
            ctx.save_for_backward(*tensors)

        def differentiate(ctx: Any, *ds: Tensor | None) -> tuple[Any, ...]:
            tensors = ctx.saved_tensors
            found = iter(backward(*tensors, ctx.lengths, ctx.numbers, *ds))
            return *(next(found) if differentiable(x) else None for x in tensors), None, None

        for each, kernel, shapes in ((name, run, fake), (f"{name}_backward", run_backward, fake_backward)):
            torch.library.impl(_library, each, "CompositeExplicitAutograd")(kernel)
            torch.library.register_fake(f"intarsia::{each}", shapes, lib=_library)
        torch.library.register_autograd(
            f"intarsia::{name}", differentiate, setup_context=setup_context, lib=_library
        )

    def __call__(
        self, tensors: Tensors, lengths: Sequence[int], numbers: Numbers, *, always: bool = False
    ) -> Sequence[Tensor]:
        """`always`: the operator in every graph, for constant lengths, too."""
        if torch.compiler.is_compiling() and (always or not all(is_static(n) for n in lengths)):
            found = self.operator(*tensors, list(lengths), list(numbers))
            return (found,) if isinstance(found, Tensor) else found
        return self.function(tensors, lengths, numbers)


def differentiable(x: Tensor | None) -> TypeGuard[Tensor]:
    """Whether an input can have a gradient."""
    return x is not None and x.is_floating_point()


def _columns(
    pairs: Sequence[tuple[Tensor, Tensor]], there: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results, inputs and the results' gradients, as `torch.autograd.grad` takes them."""
    return [y for y, _ in pairs], list(there), [d for _, d in pairs]


def _apart(results: Sequence[Tensor]) -> list[Tensor]:
    """Without gaps, and none in the memory of another: so graphs take the results of operators to be."""
    apart: list[Tensor] = []
    for result in results:
        x = result.contiguous()
        apart.append(x.clone() if any(x.data_ptr() == y.data_ptr() for y in apart) else x)
    return apart
