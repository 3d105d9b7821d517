"""What is asked of torch.compile without loading it, against what it would have done itself."""

from __future__ import annotations

import torch

from intarsia.ops.compiler import constant_in_graphs, is_static


def test_the_mark_is_that_of_torch() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs))


def test_static_sizes() -> None:
    seen = []

    @torch.compile(backend="eager", dynamic=True)
    def double(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            seen.append((is_static(x.shape[0]), is_static(x.shape[1])))
        return 2 * x

    x = torch.ones(5, 7)
    torch._dynamo.mark_static(x, 1)
    double(x)
    assert seen == [(False, True)]
