"""What operators ask of torch.compile, without loading it.

Importing the compiler takes as long as importing PyTorch, and who only counts parameters compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """The function, marked as one whose result is a constant of every graph: `torch.compiler.assume_constant_result`,
    which loads the compiler to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def all_same(values: Sequence[object]) -> bool:
    """Whether there are values, all equal. Compared, and not hashed: of lengths that are hashed torch.compile makes a
    graph each."""
    return bool(values) and all(value == values[0] for value in values)


def is_static(number: Any) -> bool:
    """Whether a size is a constant of the graph that is being made; for use while torch.compile is at work alone."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)
