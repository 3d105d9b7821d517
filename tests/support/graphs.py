"""How many graphs torch.compile makes of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

LENGTHS = (40, 70, 100, 130, 200, 64, 97, 150, 333)
"""More of them than PyTorch makes graphs of one function before it gives up (8): on both sides of a chunk's and a
window's length, and of different numbers of chunks."""


def graphs(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, backward: bool = False) -> int:
    """The graphs that `function` is compiled to for these arguments, whole ones, and with their backward passes where
    `backward` is set. Every result, a tensor, must equal that of the function itself."""
    count = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        if not backward:
            return module.forward
        compiled = torch._dynamo.lookup_backend("aot_eager")(module, inputs)
        return compiled

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for arguments in calls:
        got, expected = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if backward:
            leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.testing.assert_close(
                torch.autograd.grad(got.square().sum(), leaves),
                torch.autograd.grad(expected.square().sum(), leaves),
                rtol=1e-3,
                atol=1e-4,
            )
    return count
